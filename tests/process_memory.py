"""How much memory a process has, as the system tells it: Linux, Windows."""

import os

MOST, NOW = 1, 2              # places in PROCESS_MEMORY_COUNTERS, as words of 64 bits
MEMORY_IS_KNOWN = os.name == 'nt' or os.path.exists('/proc/self/status')


def memory(process):
    """Bytes of memory that a process has."""
    return counters_of_windows(process)[NOW] if os.name == 'nt' else in_proc(process, 'VmRSS')


def most_memory(process):
    """Bytes of memory that a process has had at most."""
    return counters_of_windows(process)[MOST] if os.name == 'nt' else in_proc(process, 'VmHWM')


def in_proc(process, what):
    with open('/proc/%d/status' % process.pid) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


def counters_of_windows(process):
    import ctypes
    counters = (ctypes.c_size_t * 9)()
    counters[0] = ctypes.sizeof(counters)
    library = ctypes.WinDLL('psapi', use_last_error=True)
    handle = ctypes.c_void_p(int(process._handle))
    if not library.GetProcessMemoryInfo(handle, counters, ctypes.sizeof(counters)):
        raise ctypes.WinError(ctypes.get_last_error())
    return counters
