"""What Windows alone has, by its own functions: access lists, the end of a session, a console's modes, memory
that programs share.

Nobody loads it elsewhere. What it is not: a decision; who calls knows what is to be done.
Threads: ``session``, which owns a window that nobody sees: by it Windows tells that the session ends. A
console's end comes on a thread of Windows' own. No locks.
"""

import contextlib
import ctypes
import mmap
import os
import re
import threading
from ctypes import wintypes
from typing import Any, Callable, Iterable, Iterator, List, Set

# --- who may do what with a file ---------------------------------------------------------------

SE_FILE_OBJECT = 1
OWNER, ACCESS, PROTECTED = 1, 4, 0x80000000    # parts of a security descriptor; no access is inherited
HAS_ACCESS_LISTS = 8                           # a flag of a disk
TOKEN_QUERY, TOKEN_USER = 8, 1
SYSTEM, ADMINISTRATORS = 'S-1-5-18', 'S-1-5-32-544'
EVERYBODY = {'WD': 'Everyone', 'AU': 'Authenticated Users', 'BU': 'Users', 'IU': 'INTERACTIVE',
             'BG': 'Guests', 'AN': 'ANONYMOUS LOGON', 'NU': 'NETWORK', 'DU': 'Domain Users',
             'DG': 'Domain Guests'}
NO_LIST = 'NO_ACCESS_CONTROL'                  # stands for a list that lets everybody do everything
MAY_READ = 0x1 | 0x80000000 | 0x10000000
READ_WORDS = {'FA', 'FR', 'GA', 'GR', 'CC'}
MAY_CHANGE = 0x2 | 0x40 | 0x10000 | 0x40000 | 0x80000 | 0x40000000 | 0x10000000
CHANGE_WORDS = {'FA', 'FW', 'GA', 'GW', 'DC', 'DT', 'SD', 'WD', 'WO'}  # the same rights as they are written


def library(name: str) -> Any:
    """A library of Windows', whose functions tell why they failed."""
    return ctypes.WinDLL(name, use_last_error=True)    # type: ignore


def last_error() -> OSError:
    """Why the last function failed."""
    return ctypes.WinError(ctypes.get_last_error())    # type: ignore


def make_private(folder: str) -> None:
    """Takes a folder, and all in it, from everybody but this user and the system. Raises OSError."""
    me = this_user()
    if not has_access_lists(folder):
        raise OSError('its disk knows no access rights, as FAT does')
    if not is_private(access_of(folder), me):
        set_access(folder, 'D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;%s)' % me)
    for path in [os.path.join(folder, name) for name in os.listdir(folder)]:
        with contextlib.suppress(FileNotFoundError):       # of another host agent, that runs there
            access = access_of(path)   # what came from elsewhere may let others in by itself
            if who_may_read(access) or who_may_change(access):
                inherit = 'OICI' if os.path.isdir(path) else ''
                set_access(path, 'D:P(A;{0};FA;;;SY)(A;{0};FA;;;{1})'.format(inherit, me))


def is_private(access: str, user: str) -> bool:
    """Whether an access list, as text, lets in that user and the system alone, and inherits nothing."""
    flags, entries = access[2:].partition('(')[0], re.findall(r'\(([^)]*)\)', access)
    return access.startswith('D:') and 'P' in flags and bool(entries) and all(
        entry.split(';')[-1] in (user, 'SY', SYSTEM) for entry in entries)


def who_may_change(access: str) -> List[str]:
    """Groups of strangers that an access list, as text, lets change what is there."""
    return strangers(access, MAY_CHANGE, CHANGE_WORDS)


def who_may_read(access: str) -> List[str]:
    """Groups of strangers that an access list, as text, lets read what is there."""
    return strangers(access, MAY_READ, READ_WORDS)


def strangers(access: str, bits: int, words: Set[str]) -> List[str]:
    """Groups of strangers to which an access list, as text, gives one of these rights."""
    if not access.startswith('D:') or NO_LIST in access:
        return [EVERYBODY['WD']]
    found = []
    for entry in re.findall(r'\(([^)]*)\)', access):
        kind, flags, rights, _, _, who = (entry.split(';') + [''] * 6)[:6]
        if kind == 'A' and 'IO' not in flags and who in EVERYBODY and gives(rights, bits, words):
            found.append(EVERYBODY[who])
    return found


def gives(rights: str, bits: int, words: Set[str]) -> bool:
    """Whether rights, as they are written, hold one of these."""
    if rights.startswith('0x'):
        return bool(int(rights, 16) & bits)
    return any(rights[at:at + 2] in words for at in range(0, len(rights), 2))


def this_user() -> str:
    """The number (SID) of the user whom this process belongs to. Raises OSError."""
    kernel, security = library('kernel32'), library('advapi32')
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    token = wintypes.HANDLE()
    if not security.OpenProcessToken(wintypes.HANDLE(kernel.GetCurrentProcess()), TOKEN_QUERY,
                                     ctypes.byref(token)):
        raise last_error()
    try:
        size = wintypes.DWORD()
        security.GetTokenInformation(token, TOKEN_USER, None, 0, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if not security.GetTokenInformation(token, TOKEN_USER, buffer, size, ctypes.byref(size)):
            raise last_error()
        return number_of(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_void_p))[0])
    finally:
        kernel.CloseHandle(token)


def number_of(sid: Any) -> str:
    """A SID as text. Raises OSError."""
    text = wintypes.LPWSTR()
    if not library('advapi32').ConvertSidToStringSidW(ctypes.c_void_p(sid), ctypes.byref(text)):
        raise last_error()
    return taken(text)


def taken(text: Any) -> str:
    """What Windows allocated as text, which is given back."""
    try:
        return text.value or ''
    finally:
        free(text)


def free(pointer: Any) -> None:
    """Gives back what Windows allocated."""
    library('kernel32').LocalFree(ctypes.cast(pointer, ctypes.c_void_p))


def owner_of(path: str) -> str:
    """The number of the user whose file or folder it is. Raises OSError."""
    owner = ctypes.c_void_p()
    with descriptor_of(path, OWNER, ctypes.byref(owner)):
        return number_of(owner.value)


def access_of(path: str) -> str:
    """The access list of a file or folder, as text. Raises OSError."""
    text = wintypes.LPWSTR()
    with descriptor_of(path, ACCESS) as descriptor:
        if not library('advapi32').ConvertSecurityDescriptorToStringSecurityDescriptorW(
                descriptor, 1, ACCESS, ctypes.byref(text), None):
            raise last_error()
        return taken(text)


@contextlib.contextmanager
def descriptor_of(path: str, part: int, owner: Any = None) -> Iterator[Any]:
    """A part of the security descriptor of a file or folder. ``owner``: where to note whose it is. Raises
    OSError."""
    descriptor = ctypes.c_void_p()
    code = library('advapi32').GetNamedSecurityInfoW(
        ctypes.c_wchar_p(path), SE_FILE_OBJECT, part, owner, None, None, None, ctypes.byref(descriptor))
    if code:
        raise ctypes.WinError(code)                    # type: ignore
    try:
        yield descriptor
    finally:
        free(descriptor)


def set_access(path: str, access: str) -> None:
    """Gives a file, or a folder and all in it, that access list, and no inherited one. Raises OSError."""
    security = library('advapi32')
    descriptor, entries = ctypes.c_void_p(), ctypes.c_void_p()
    present, by_default = wintypes.BOOL(), wintypes.BOOL()
    if not security.ConvertStringSecurityDescriptorToSecurityDescriptorW(
            ctypes.c_wchar_p(access), 1, ctypes.byref(descriptor), None):
        raise last_error()
    try:
        if not security.GetSecurityDescriptorDacl(descriptor, ctypes.byref(present), ctypes.byref(entries),
                                                  ctypes.byref(by_default)):
            raise last_error()
        code = security.SetNamedSecurityInfoW(
            ctypes.c_wchar_p(path), SE_FILE_OBJECT, wintypes.DWORD(ACCESS | PROTECTED), None, None, entries,
            None)
        if code:
            raise ctypes.WinError(code)                # type: ignore
    finally:
        free(descriptor)


def has_access_lists(path: str) -> bool:
    """Whether the disk of a path keeps them. Raises OSError."""
    kernel = library('kernel32')
    volume, flags = ctypes.create_unicode_buffer(1024), wintypes.DWORD()
    if not (kernel.GetVolumePathNameW(ctypes.c_wchar_p(path), volume, 1024) and kernel.GetVolumeInformationW(
            volume, None, 0, None, None, ctypes.byref(flags), None, 0)):
        raise last_error()
    return bool(flags.value & HAS_ACCESS_LISTS)


# --- the end of a session ----------------------------------------------------------------------

WM_DESTROY, WM_CLOSE, WM_QUERYENDSESSION, WM_ENDSESSION = 0x02, 0x10, 0x11, 0x16
CTRL_BREAK = 1                 # an event of a console, which some C libraries make no signal of
CONSOLE_ENDS = (2, 5, 6)       # others: it is closed, the user logs off, the system shuts down
LONGEST_END = 15.0             # seconds that the session's end is held up; Windows itself may wait less
WINDOW = 'vmhost'


def callback_type(*types: Any) -> Any:
    """A function of ours that Windows calls: what it gives, what it takes."""
    return ctypes.WINFUNCTYPE(*types)                  # type: ignore


class SessionEnd:
    """Tells when this program has to end: the user logs off, the system shuts down, the console is closed, or
    somebody asks its window to close, as ``taskkill`` and the task scheduler do.

    ``close`` once it has ended; until then, and for LONGEST_END at most, Windows is asked to wait.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        """end    has the program end; called on a thread of ours or of Windows'"""
        self._end = end
        self._ended = threading.Event()
        self._window: Any = None
        self._has_window = threading.Event()
        self._on_console = callback_type(wintypes.BOOL, wintypes.DWORD)(self._console)
        library('kernel32').SetConsoleCtrlHandler(self._on_console, True)
        self._thread = threading.Thread(target=self._watch, name='session', daemon=True)
        self._thread.start()
        self._has_window.wait(5)

    def close(self) -> None:
        """The program has done what it had to do: Windows goes on."""
        self._ended.set()
        library('kernel32').SetConsoleCtrlHandler(self._on_console, False)
        if self._window:
            library('user32').PostMessageW(wintypes.HWND(self._window), WM_DESTROY, 0, 0)
            self._thread.join(1)

    def _console(self, event: int) -> bool:
        """On a thread of Windows', which ends the program when this returns from one of CONSOLE_ENDS."""
        if event not in CONSOLE_ENDS + (CTRL_BREAK,):
            return False               # Ctrl-C is a signal
        self._end()
        if event == CTRL_BREAK:
            return True
        self._ended.wait(LONGEST_END)
        return True

    def _watch(self) -> None:
        user, kernel = library('user32'), library('kernel32')
        procedure_type = callback_type(wintypes.LPARAM, wintypes.HWND, wintypes.UINT, wintypes.WPARAM,
                                       wintypes.LPARAM)
        user.DefWindowProcW.restype = wintypes.LPARAM
        user.DefWindowProcW.argtypes = [wintypes.HWND, wintypes.UINT, wintypes.WPARAM, wintypes.LPARAM]
        user.CreateWindowExW.restype = wintypes.HWND
        kernel.GetModuleHandleW.restype = wintypes.HMODULE

        class WindowClass(ctypes.Structure):
            """WNDCLASSW."""
            _fields_ = [('style', wintypes.UINT), ('procedure', procedure_type), ('extra', ctypes.c_int),
                        ('window_extra', ctypes.c_int), ('instance', wintypes.HINSTANCE),
                        ('icon', wintypes.HANDLE), ('cursor', wintypes.HANDLE),
                        ('background', wintypes.HANDLE), ('menu', wintypes.LPCWSTR),
                        ('name', wintypes.LPCWSTR)]

        def procedure(window: Any, message: int, word: int, more: int) -> int:
            if message == WM_DESTROY:
                user.PostQuitMessage(0)
                return 0
            return self._hear(message, word, lambda: user.DefWindowProcW(window, message, word, more))
        instance = kernel.GetModuleHandleW(None)
        kind = WindowClass(procedure=procedure_type(procedure), instance=instance, name=WINDOW)
        user.RegisterClassW(ctypes.byref(kind))
        self._window = user.CreateWindowExW(0, WINDOW, WINDOW, 0, 0, 0, 0, 0, None, None,
                                            wintypes.HINSTANCE(instance), None)
        self._has_window.set()
        message = wintypes.MSG()
        while self._window and user.GetMessageW(ctypes.byref(message), None, 0, 0) > 0:
            user.DispatchMessageW(ctypes.byref(message))

    def _hear(self, message: int, word: int, default: Callable[[], int]) -> int:
        """What the window answers to a message of Windows'."""
        if message == WM_QUERYENDSESSION:
            return 1                   # the session may end
        if message == WM_CLOSE:
            self._end()
            return 0
        if message == WM_ENDSESSION and word:
            self._end()
            self._ended.wait(LONGEST_END)
            return 0
        return default()


# --- the console -------------------------------------------------------------------------------

OUTPUT_HANDLE = -11
OBEYS_ESCAPES = 4              # a mode of a console


def switch_colours_on() -> bool:
    """Has the console obey the terminal's escape sequences; whether it does."""
    with contextlib.suppress(OSError, AttributeError):
        kernel, mode = library('kernel32'), wintypes.DWORD()
        kernel.GetStdHandle.restype = wintypes.HANDLE
        console = wintypes.HANDLE(kernel.GetStdHandle(OUTPUT_HANDLE))
        if kernel.GetConsoleMode(console, ctypes.byref(mode)):
            return bool(kernel.SetConsoleMode(console, mode.value | OBEYS_ESCAPES))
    return False


# --- memory that programs share ----------------------------------------------------------------

FILE_MAP_READ, FILE_MAP_WRITE = 4, 2


PRIORITIES = (0x40, 0x4000, 0x20, 0x8000, 0x80, 0x100)     # classes of processes, the lowest first
MAY_SET, MAY_ASK = 0x200, 0x1000                           # of a process


def share_priority(pid: int) -> None:
    """Gives a process this one's priority, where it has a higher one, and where Windows lets it."""
    kernel = library('kernel32')
    kernel.OpenProcess.restype = kernel.GetCurrentProcess.restype = wintypes.HANDLE
    for function in (kernel.GetPriorityClass, kernel.CloseHandle):
        function.argtypes = [wintypes.HANDLE]
    kernel.SetPriorityClass.argtypes = [wintypes.HANDLE, wintypes.DWORD]
    process = kernel.OpenProcess(MAY_SET | MAY_ASK, False, pid)
    if not process:
        return
    try:
        mine, theirs = [kernel.GetPriorityClass(each) for each in (kernel.GetCurrentProcess(), process)]
        if {mine, theirs} <= set(PRIORITIES) and PRIORITIES.index(theirs) > PRIORITIES.index(mine):
            kernel.SetPriorityClass(process, mine)
    finally:
        kernel.CloseHandle(process)


def shared_memory(names: Iterable[str], size: int) -> Any:
    """So many bytes of the first of these file mappings that another program has made; None where none is
    there. Raises OSError."""
    kernel = library('kernel32')
    kernel.OpenFileMappingW.restype, kernel.CloseHandle.argtypes = wintypes.HANDLE, [wintypes.HANDLE]
    for name in names:
        handle = kernel.OpenFileMappingW(FILE_MAP_READ | FILE_MAP_WRITE, False, name)
        if handle:
            mapping = mmap.mmap  # type: Any           # whose tagname is Windows' alone
            try:
                return mapping(-1, size, tagname=name)
            finally:
                kernel.CloseHandle(handle)
    return None
