"""A real Linux guest for the tests: gives it the agent, its address, and a QEMU to run in."""

import contextlib
import http.server
import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading

import vmguest

PORT = 8765                    # where the guest looks for its agent
PYTHON = 'python3.11'          # the guest's, which the machine may have, too
# Compiles the modules of a bundle into a folder; under the names that they will have in the guest.
COMPILE = '''
import os, sys, zipfile
from py_compile import PycInvalidationMode, compile
archive, folder = sys.argv[1:]
with zipfile.ZipFile(archive) as bundle:
    for name in bundle.namelist():
        if name.endswith('.py') and name != '__main__.py':
            compile(bundle.extract(name, folder + '/sources'), os.path.join(folder, 'modules', name + 'c'),
                    '/agent/modules/' + name, True, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
'''
START = '''import runpy, sys
sys.path.insert(0, '/agent/modules')
runpy.run_module('vmguest', run_name='__main__', alter_sys=True)
'''


def agent_archive(ini, folder, compiled):
    """agent.tar: guest.ini, and the bundle, under the name that the guest runs. ``compiled``: where that can
    be had, what is in the bundle as the guest's Python would compile it."""
    bundle = os.path.join(str(folder), 'vmguest.pyz')
    subprocess.check_call([sys.executable, vmguest.__file__, '--bundle', bundle], stdout=subprocess.DEVNULL)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as tar:
        def add(name, data):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if compiled and compile_modules(bundle, str(folder)):
            add('vmguest.py', START.encode())
            tar.add(os.path.join(str(folder), 'modules'), 'modules')
        else:
            tar.add(bundle, 'vmguest.py')
        add('guest.ini', ini.encode())
    return packed.getvalue()


def compile_modules(bundle, folder):
    """Into FOLDER/modules, by the machine's Python of the guest's version; False where it has none."""
    there = os.environ.get('VMHOST_RIG_DIR', '')
    found = subprocess.call(['chroot', '/machine', PYTHON, '-c', ''], stderr=subprocess.DEVNULL) == 0
    if found:
        subprocess.check_call(
            ['chroot', '/machine', PYTHON, '-I', '-S', '-c', COMPILE, there + bundle, there + folder])
    return found


@contextlib.contextmanager
def agent_on_offer(address, ini, folder, compiled=False):
    """Serves the agent at http://ADDRESS:8765/agent.tar, to whoever asks; ``compiled``: see agent_archive."""
    archive = agent_archive(ini, folder, compiled)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(archive)))
            self.end_headers()
            self.wfile.write(archive)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer((address, PORT), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class DHCPServer:
    """Gives the first address of a pool to whoever asks on an interface, and a router where there is one."""

    def __init__(self, interface, network):
        self.network = network
        self.asked = []        # the MACs that got an address
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b'\0')
        self.socket.bind(('', 67))
        self.socket.settimeout(0.1)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stopping.set()
        self.thread.join()
        self.socket.close()

    def serve(self):
        while not self.stopping.is_set():
            try:
                packet = self.socket.recv(2048)
            except socket.timeout:
                continue
            self.socket.sendto(self.answer(packet), ('255.255.255.255', 68))

    def answer(self, packet):
        """OFFER to a DISCOVER, ACK to a REQUEST (RFC 2131)."""
        kind = packet[packet.index(b'\x35\x01', 240) + 2]
        mac = packet[28:34]
        if kind == 3:
            self.asked.append(':'.join('%02X' % byte for byte in mac))
        server, address = (socket.inet_aton(self.network[key]) for key in ('server', 'lower'))
        head = struct.pack('!BBBB4sHH4s4s4s4s16s192s4s', 2, 1, 6, 0, packet[4:8], 0, 0x8000, b'', address,
                           server, b'', mac, b'', b'\x63\x82\x53\x63')
        options = b'\x35\x01' + bytes([2 if kind == 1 else 5]) + b'\x36\x04' + server
        options += b'\x33\x04' + struct.pack('!L', 3600)
        options += b'\x01\x04' + socket.inet_aton(self.network['netmask'])
        options += b'\x03\x04' + socket.inet_aton(self.network['router']) if self.network['router'] else b''
        return head + options + b'\xff'


@contextlib.contextmanager
def qemu(image, bridge, mac, serial, board_serial=''):
    """The machine's QEMU with the guest image, its card on a bridge. ``image``: the machine's path;
    ``board_serial``: what its firmware tells."""
    tap = 'tap-' + bridge
    subprocess.check_call(['ip', 'tuntap', 'add', tap, 'mode', 'tap'])
    subprocess.check_call(['ip', 'link', 'set', tap, 'master', bridge, 'up'])
    process = subprocess.Popen(
        ['chroot', '/machine', 'qemu-system-x86_64', '-m', '512', '-display', 'none', '-no-reboot',
         '-kernel', image + '/vmlinuz', '-initrd', image + '/initrd.gz', '-append', 'console=ttyS0 quiet',
         '-netdev', 'tap,id=n,ifname=%s,script=no,downscript=no' % tap,
         '-device', 'e1000,netdev=n,mac=' + mac, '-serial', 'stdio']
        + ['-smbios', 'type=2,serial=' + board_serial] * bool(board_serial),
        stdin=subprocess.DEVNULL, stdout=serial, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        subprocess.check_call(['ip', 'link', 'del', tap])
