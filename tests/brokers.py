"""External brokers for the tests and the benchmark: processes of our own, never the system's service.

``RabbitMQ`` and ``ActiveMQ`` run what Debian's packages install, with the configuration that
docs/broker.md shows, in a folder of their own and on free ports of 127.0.0.1.
"""

import configparser
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess

from helpers import wait_until

import protocol

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def snippet(name, section):
    """The block of docs/broker.md whose first lines name this file, in the section of that title."""
    with open(os.path.join(TOP, 'docs', 'broker.md'), encoding='utf-8') as page:
        text = re.split(r'^##+ %s$' % section, page.read(), flags=re.MULTILINE)[1]
    for block in re.findall(r'^```\w+\n(.*?)^```$', text, re.DOTALL | re.MULTILINE):
        if re.match(r'\W*(?:"__comment": ")?%s\W*\n' % re.escape(name), block):
            return block
    raise AssertionError('docs/broker.md shows no %s' % name)


def broker_section(name, section):
    """The keys of [Broker] in an ini file that the page shows."""
    parser = configparser.ConfigParser()
    parser.read_string(snippet(name, section))
    return dict(parser['Broker'])


HOST = broker_section('host.ini', 'External')
GUEST = broker_section('guest.ini', 'External')


def make_certificate(folder):
    """Paths of a certificate for 127.0.0.1 and of its key."""
    certificate, key = os.path.join(folder, 'cert.pem'), os.path.join(folder, 'key.pem')
    subprocess.check_call(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-keyout', key,
         '-out', certificate, '-subj', '/CN=vmhost', '-addext', 'subjectAltName=IP:127.0.0.1'],
        stderr=subprocess.DEVNULL)
    return certificate, key


class ExternalBroker:
    """What both have in common: a folder, a port, one process with what it says in ``log``."""
    name = ''
    connect = protocol.encode('CONNECT', {
        'accept-version': '1.2', 'host': '/', 'heart-beat': '0,0', 'login': HOST['username'],
        'passcode': HOST['password']}, version='1.2')

    def __init__(self, folder, tls=None, quick_start=False):
        self.folder = str(folder)
        os.makedirs(self.folder, exist_ok=True)
        self.port = free_port()
        self.tls = tls                     # paths of certificate and key, or None
        self.quick_start = quick_start     # with less for a long run, on processors that others use, too
        self.process = None
        self.log_path = os.path.join(self.folder, 'log')

    def broker_keys(self, shown):
        """The section [Broker] of an agent's ini file, from what the page shows."""
        keys = dict(shown, host='127.0.0.1', port=self.port)
        return dict(keys, tls='yes', ca_file=self.tls[0]) if self.tls else keys

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, 'w') as file:
            file.write(text)
        return path

    def spawn(self, command, environment):
        with open(self.log_path, 'ab') as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env=dict(os.environ, **environment), start_new_session=True)

    def start(self, timeout=120):
        self.launch()
        try:
            wait_until(lambda: self.process.poll() is not None or self.answers(), timeout)
            assert self.process.poll() is None, '%s ended:\n%s' % (self.name, self.log())
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def answers(self):
        """Whether a client is let in: a port may be open before that."""
        try:
            with socket.create_connection(('127.0.0.1', self.port), 5) as plain:
                client = plain
                if self.tls:
                    client = ssl.create_default_context(cafile=self.tls[0]).wrap_socket(
                        plain, server_hostname='127.0.0.1')
                with client:
                    client.sendall(self.connect)
                    return client.recv(9) == b'CONNECTED'
        except OSError:
            return False

    def stop(self, number=signal.SIGTERM, timeout=60):
        """Ends the process and its helpers, as a crash does where ``number`` is SIGKILL."""
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(timeout)
        finally:
            self.end_session()
            self.process.wait()
            self.process = None

    def end_session(self):
        """Whatever the process started, it leaves with it."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def log(self):
        with open(self.log_path, errors='replace') as file:
            return file.read()[-5000:]

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()


class RabbitMQ(ExternalBroker):
    """RabbitMQ with its STOMP plugin, and an epmd (Erlang's port mapper) of its own."""
    name = 'RabbitMQ'
    server = '/usr/lib/rabbitmq/bin/rabbitmq-server'
    epmd = None
    idle_options = ' +sbwt none +sbwtdcpu none +sbwtdio none'      # its threads don't spin while they wait

    @classmethod
    def missing(cls):
        """Why it can't run here, or ''."""
        if os.path.exists(cls.server) and shutil.which('epmd'):
            return ''
        return 'needs RabbitMQ (package rabbitmq-server)'

    def configuration(self):
        text = snippet('rabbitmq.conf, TLS' if self.tls else 'rabbitmq.conf', 'RabbitMQ')
        for shown, ours in (('61613', self.port), ('61614', self.port),
                            ('/etc/rabbitmq/cert.pem', self.tls and self.tls[0]),
                            ('/etc/rabbitmq/key.pem', self.tls and self.tls[1]),
                            ('/etc/rabbitmq', self.folder)):
            text = text.replace(shown, str(ours))
        return text

    def definitions(self):
        return snippet('definitions.json', 'RabbitMQ')

    def launch(self):
        self.write('definitions.json', self.definitions())
        folder, epmd_port = self.folder, free_port()
        environment = {
            'ERL_EPMD_PORT': str(epmd_port), 'ERL_EPMD_ADDRESS': '127.0.0.1', 'HOME': folder,
            'RABBITMQ_NODENAME': 'vmhost-%d@localhost' % self.port, 'RABBITMQ_NODE_IP_ADDRESS': '127.0.0.1',
            'RABBITMQ_DIST_PORT': str(free_port()),
            'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': '-kernel inet_dist_use_interface {127,0,0,1}'
                                                   + self.idle_options * self.quick_start,
            'RABBITMQ_CONFIG_FILE': self.write('rabbitmq.conf', self.configuration()),
            'RABBITMQ_ENABLED_PLUGINS_FILE': self.write(
                'enabled_plugins', snippet('enabled_plugins', 'RabbitMQ')),
            'RABBITMQ_CONF_ENV_FILE': os.path.join(folder, 'no-such-file'),
            'RABBITMQ_MNESIA_BASE': os.path.join(folder, 'data'), 'RABBITMQ_LOG_BASE': folder,
            'RABBITMQ_LOGS': '-', 'RABBITMQ_PID_FILE': os.path.join(folder, 'pid')}
        self.epmd = self.spawn([shutil.which('epmd'), '-address', '127.0.0.1', '-port', str(epmd_port)], {})
        self.process = self.spawn([self.server], environment)

    def end_session(self):
        super().end_session()
        self.epmd.kill()
        self.epmd.wait()


class ActiveMQ(ExternalBroker):
    """ActiveMQ with a STOMP connector."""
    name = 'ActiveMQ'
    home = '/usr/share/activemq'
    options = ['-Xms128M', '-Xmx512M']
    quick_options = ['-XX:TieredStopAtLevel=1', '-XX:+UseSerialGC']    # compiled once, and not better later

    @classmethod
    def missing(cls):
        """Why it can't run here, or ''."""
        if os.path.exists(cls.home + '/bin/activemq.jar') and shutil.which('java'):
            return ''
        return 'needs ActiveMQ (package activemq)'

    def configuration(self):
        text = snippet('activemq.xml', 'ActiveMQ').replace('61613', str(self.port))
        return text.replace('/var/lib/activemq/vmhost', self.folder)

    def launch(self):
        configuration = self.write('activemq.xml', self.configuration())
        places = ['-Dactivemq.%s=%s' % item for item in (
            ('home', self.home), ('base', self.folder), ('conf', self.folder), ('data', self.folder))]
        options = self.options + self.quick_options * self.quick_start
        self.process = self.spawn(
            ['java'] + options + places + [
                '-jar', self.home + '/bin/activemq.jar', 'start', 'xbean:file:' + configuration], {})


EXTERNAL = (RabbitMQ, ActiveMQ)
