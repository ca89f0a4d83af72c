"""The machines: agents that said HELLO and VMs of the hypervisor, brought together under one name and one id.

What it is not: the hypervisor (hosthypervisor.py), or the list of live agents (hostguests.py).

Threads: any thread may call. ``vm_event`` runs on the driver's thread; names that only the hypervisor
knows are looked up on ``name-lookup-1``, since it may take its time. No locks of its own.
"""

import logging
import os
from typing import Any, Callable, Dict, List, Optional, Tuple

import agent
import chirpclient
import drivers
import vmstates
from faults import (
    AgentNotConnected,
    AlreadyExists,
    BadState,
    DeadlineExceeded,
    InvalidParams,
    NoFiles,
    NoSuchVM,
    VMHostError,
)
from hostcommands import Commands
from hostguests import Guest, Guests
from hostjournal import Journal
from hostlink import Connection
from hosttrust import Session, Trust
from hostworkers import Batch
from protocol import BadWord, is_mac, read_id, read_secret

log = logging.getLogger('vmhost')

BROKER_PORT = 61613            # that guests try where nothing tells them another one
MISTYPED = 0.75                # how like a name a word must be to be meant as it
CHIRP_PORT = 9094              # where a guest's Chirp server listens, unless it says otherwise
CHIRP_TIMEOUT = 30.0           # seconds of silence that a Chirp server may keep
LOOKUP_EVERY = 1.0             # seconds between two lookups of names, however often guests say HELLO


class Machines:
    """Finds the machine that is meant by a name or an id, and keeps names and ids in step."""

    def __init__(self, guests: Guests, commands: Commands, journal: Journal, connection: Connection,
                 trust: Trust) -> None:
        self.hypervisor = None                 # type: Any      # a driver, once one has been started
        self.no_hypervisor = ''                # why there is none
        self._guests = guests
        self._commands = commands
        self._journal = journal
        self._connection = connection
        self._trust = trust
        self._lookups = Batch('name-lookup', self._look_up, after=LOOKUP_EVERY)

    # The hypervisor.

    def start_hypervisor(self, settings: Any, state_dir: str) -> None:
        """Starts the driver, if one is wanted and its hypervisor is there; it may answer later."""
        driver, reasons = start_driver(settings, state_dir, self._vm_event, self._trust.board_serial)
        self.no_hypervisor = '; '.join(['hypervisor=%s' % settings.Hypervisor.hypervisor] + reasons)
        if driver is not None and settings.Network.manage:
            try:
                driver.version()                # which is at once told, where nothing answers
                driver.setup_network()
            except VMHostError as error:
                log.error('the host-only network can\'t be set up ([Network] manage): %s', error)
        self.hypervisor = self._trust.hypervisor = driver

    @property
    def hypervisor_name(self) -> str:
        return self.hypervisor.name if self.hypervisor is not None else 'none'

    def stop(self, deadline: float) -> None:
        """Ends lookups, until that monotonic time."""
        self._lookups.stop(deadline)

    def _vm_event(self, type: str, vm: str, text: str) -> None:
        """Something about a VM changed in the hypervisor."""
        self._journal.event(type, vm, '', text)
        log.info('%s: %s %s', vm, type, text)
        guest = self._guests.find(vm)
        if type == 'vm-aborted' and self.hypervisor.known_state(vm) == vmstates.SAVED:
            log.info('%s: its saved state is still there, and so are its commands', vm)
        elif type in ('vm-aborted', 'vm-stuck') and guest is not None:
            for execution in self._commands.open_of(guest.id):
                if execution.state == 'running' and not self._commands.may_return(execution):
                    self._commands.lose(execution, 'the VM ended: %s' % text)
        elif type == 'vm-removed' and guest is not None:
            self._guests.gone(guest.id)
        elif type in ('vm-added', 'vm-renamed', 'vm-card'):
            for guest in self._guests.all():
                if self._known_name(guest.id) not in ('', guest.name):
                    self._rename(guest)

    def _known_name(self, machine_id: str) -> str:
        """The hypervisor's name for an id, without asking it; '' where it has none."""
        return self.hypervisor.known_name(machine_id) if self.hypervisor is not None else ''

    def is_suspended(self, vm: str) -> bool:
        """Whether the VM is paused or saved, so that nothing can be heard of it."""
        return self.hypervisor is not None and self.hypervisor.known_state(vm) in vmstates.SUSPENDED

    # Agents that come.

    def look_for(self, machine_id: str, connection: str) -> None:
        """Has a VM looked for that the driver hasn't seen so far; its agent is asked to say HELLO again."""
        self._lookups.add(machine_id, connection)

    def join(self, machine_id: str, own_name: str, **facts: Any) -> Guest:
        """An agent proved itself: it is listed under its name, and told that. ``facts`` as of Guests.add."""
        known = self._known_name(machine_id)
        guest, news = self._guests.add(machine_id, known or self._free_name(machine_id, own_name), **facts)
        if known:
            self._guests.rename(guest, known)
        self._introduce(guest, news, bool(known))
        return guest

    def _free_name(self, machine_id: str, name: str) -> str:
        """What a machine calls itself, with its id appended where a VM is called so."""
        if self.hypervisor is not None and self.hypervisor.known_state(name) and name != machine_id:
            return '%s-%s' % (name, machine_id)
        return name

    def _introduce(self, guest: Guest, is_news: bool, is_vm: bool) -> None:
        if is_news and self._guests.should_note(guest):
            log.info('%s joined: %s at %s', guest.name, guest.id, guest.ip)
            # Not durable: who comes and goes tells it again, and a guest's words don't wait for the disk.
            with self._journal.best_effort(), self._journal.writing(durable=False) as journal:
                journal.add_guest(guest)
                journal.event('guest-hello', guest.name, '', '%s at %s' % (guest.id, guest.ip))
        if is_vm:
            self.take_over(guest)
        session = self._trust.sessions.of(guest.id)
        if session is not None and session.name != guest.name:
            self.greet(session, guest.name)

    def greet(self, session: Session, name: str) -> None:
        """Tells an agent its name, and what it needs to know of this host."""
        self._connection.greet(session, name)

    def _look_up(self, connections: Dict[str, str]) -> None:
        for machine_id, connection in connections.items():
            if self._lookups.is_stopping:
                return
            try:
                if self.hypervisor.name_of(machine_id):
                    self._connection.call_the_roll(connection)
                else:
                    self._refuse(machine_id, connection, 'no VM has the network card %s' % machine_id)
            except VMHostError as error:
                self._refuse(machine_id, connection, 'the hypervisor doesn\'t answer: %s' % error)

    def _refuse(self, machine_id: str, connection: str, why: str) -> None:
        self._trust.refused(machine_id, why)
        self._connection.refuse(machine_id, connection, why)

    def _rename(self, guest: Guest) -> None:
        """Gives a guest the name that the hypervisor has for it, where it has one."""
        try:
            name = self.hypervisor.name_of(guest.id)
        except VMHostError as error:
            log.warning('no name for %s: %s', guest.id, error)
            return
        if name and name != guest.name:
            log.info('%s is %s', guest.name, name)
            self._guests.rename(guest, name)
            self._introduce(guest, True, True)

    def take_over(self, guest: Guest) -> None:
        """Moves commands that wait for a VM under the id of a network card that it no longer has to its
        present id. What was sent stays under the old id, as the guest has it in that agent's spool."""
        with self._journal.best_effort():
            for execution in self._commands.waiting_for(guest.name):
                if execution.vm_id != guest.id and not self._known_name(execution.vm_id):
                    self._commands.move(execution, guest.id)

    def removed(self, guest: Guest) -> None:
        """The VM and its disks are no more: neither are its commands."""
        self.take_over(guest)
        for execution in self._commands.open_of(guest.id):
            self._commands.lose(execution, 'the VM and its disks were removed')

    def pair(self, machine_id: str, path: str) -> None:
        """Pins the secret in a file to an id. Raises InvalidParams, AlreadyExists, JournalError."""
        try:
            with open(path, 'rb') as file:
                secret = read_secret(agent.decoded(file.read(400)).strip())
            machine_id = read_id(machine_id)
        except OSError as error:
            raise InvalidParams('%s: %s' % (path, error.strerror))
        except (BadWord, UnicodeDecodeError) as error:
            raise InvalidParams(str(error) if isinstance(error, BadWord) else '%s: no text' % path)
        if self._trust.secrets.pinned(machine_id) not in (b'', secret):
            raise AlreadyExists('%s has another secret: forget it first' % machine_id)
        self._trust.secrets.pin(machine_id, secret)

    def forget(self, guest: Guest) -> None:
        """Forgets a machine: name, id and secret are free, its commands lost. Raises JournalError.

        An agent that is still there is no longer listened to.
        """
        self._trust.forget(guest.id)
        for execution in self._commands.open_of(guest.id):
            self._commands.lose(execution, 'the VM was forgotten')
        with self._journal.writing() as journal:
            journal.execute('DELETE FROM guests WHERE id = ?', guest.id)
            journal.event('guest-forgotten', guest.name, '', guest.id)
        self._guests.forget(guest.id)
        log.info('forgot %s, %s', guest.name, guest.id)

    # Which machine is meant.

    def name_of(self, machine_id: str) -> str:
        """The name of a guest, or its id."""
        guest = self._guests.by_id(machine_id)
        return guest.name if guest is not None else machine_id

    def find(self, vm: str) -> Guest:
        """A known VM, by name or id. Raises NoSuchVM; BadState where two VMs are meant, or have its id."""
        refusal = self.hypervisor.refusal_of(vm) if self.hypervisor is not None else ''
        if refusal:
            raise BadState(refusal)
        guest = self._guests.find(vm)
        # By now the VM may have another card; or it is a new one, of the name of a machine outside.
        if guest is None or guest.agent == 'lost' or self._is_vms_name(guest.id):
            guest = self.describe(vm)[0] or guest
        if guest is None:
            import difflib  # needed here alone
            names = [known.name for known in self._guests.all()]
            close = [name for name in names if name.lower() == vm.lower()] \
                or difflib.get_close_matches(vm[:100], names, 1, MISTYPED)
            raise NoSuchVM('no VM %.100r%s' % (vm, '; did you mean %s?' % close[0] if close else ''))
        return guest

    def _is_vms_name(self, machine_id: str) -> bool:
        return (self.hypervisor is not None and not is_mac(machine_id)
                and bool(self.hypervisor.known_state(machine_id)))

    def describe(self, vm: str) -> Tuple[Optional[Guest], Dict[str, Any]]:
        """A VM as its agent and as the hypervisor know it; (None, {}) where the hypervisor doesn't. As it was
        seen last, where the hypervisor takes its time; of a machine whose agent was there that it hasn't
        told yet, the trouble alone."""
        if self.hypervisor is None:
            return None, {}
        try:
            found = self.hypervisor.describe(vm)
        except NoSuchVM:
            return None, {}
        except DeadlineExceeded as error:
            if self._guests.find(vm) is None:
                raise
            return None, {'trouble': str(error)}
        guest = None if self.hypervisor.clash_of(found['id']) else self._guests.by_id(found['id'])
        return guest or Guest(found['id'], found['name']), found

    def all_described(self) -> List[Tuple[Guest, Dict[str, Any]]]:
        """`describe` of every known machine, in short: with the rows of the driver's `machines`, {} for a
        machine that the hypervisor doesn't know. One look for all of them. Raises VMHostError."""
        rows = self.rows()
        shared = {row['id'] for row in rows if self.hypervisor.clash_of(row['id'])}
        row_of = {row['id']: row for row in rows if row['id'] not in shared}
        guests = [guest for guest in self._guests.all() if guest.id not in shared]
        known = {guest.id for guest in guests}
        return ([(guest, row_of.get(guest.id, {})) for guest in guests]
                + [(Guest(row['id'], row['name']), row) for row in rows if row['id'] not in known])

    def rows(self) -> List[Dict[str, Any]]:
        """The rows of the driver's `machines`. None where it has never answered, but there are other machines
        to list: its `trouble` tells that then. Raises VMHostError."""
        try:
            return self.hypervisor.list_rows() if self.hypervisor is not None else []
        except DeadlineExceeded:
            if not self._guests.all():
                raise
            return []

    def all(self) -> List[Guest]:
        """Every known machine by name: agents that were ever there, and VMs of which none was heard."""
        vms = self.hypervisor.known_vms() if self.hypervisor is not None else ()
        found = self._guests.all() + [Guest(row['id'], row['name']) for row in vms
                                      if row['id'] and self._guests.by_id(row['id']) is None]
        return sorted(found, key=lambda guest: agent.in_order(guest.name))

    def connected(self, vm: str) -> Guest:
        """A VM whose agent is there. Raises NoSuchVM, AgentNotConnected."""
        guest = self.find(vm)
        if guest.agent == 'lost':
            raise AgentNotConnected('the agent of %s is not connected' % guest.name)
        return guest

    def can_answer(self, machine_id: str) -> bool:
        """Whether an agent is connected, and its VM runs."""
        guest = self._guests.by_id(machine_id)
        return guest is not None and guest.agent != 'lost' and not self.is_suspended(guest.name)

    # Files.

    def chirp_client(self, guest: Guest) -> chirpclient.ChirpClient:
        """A client of a guest's Chirp server, for a ``with`` block. Raises TransferError."""
        endpoint = self.hypervisor.chirp_endpoint(guest.name) if self.hypervisor is not None else None
        address, port = endpoint or (guest.ip, guest.chirp_port)
        if not port:
            raise NoFiles('%s offers no files (it has no Chirp server)' % guest.name)
        return chirpclient.ChirpClient(address, port, CHIRP_TIMEOUT, self._trust.secret_of(guest.id),
                                       guest.id, self._connection.files_tls() if guest.chirp_tls else None)


def start_driver(settings: Any, state_dir: str, on_event: Callable[[str, str, str], None],
                 secret_of: Callable[[str, str], str]) -> Tuple[Any, List[str]]:
    """The first driver whose hypervisor answers, or hangs: the host agent goes on, and who asks for VMs is
    told. None where none is wanted or there; and why not each."""
    wanted = settings.Hypervisor.hypervisor
    reasons = []  # type: List[str]
    for name in drivers.names_of(wanted):
        import hosthypervisor  # some memory, where VMs are controlled
        driver = hosthypervisor.Hypervisor(name, driver_settings(settings, state_dir), on_event, secret_of)
        driver.open()
        try:
            log.info('%s %s', name, driver.version())
            for warning in reasons + driver.warnings():
                log.warning('%s', warning)
            return driver, reasons
        except DeadlineExceeded as error:
            log.warning('%s: it hangs, perhaps. Its VMs are there as soon as it answers', error)
            return driver, reasons
        except VMHostError as error:
            reasons.append('%s: %s' % (name, error))
            driver.close()
    if reasons:
        log.log(logging.INFO if wanted == 'auto' else logging.ERROR,
                'VMs can\'t be controlled, everything else works: %s', '; '.join(reasons))
    return None, reasons


def driver_settings(settings: Any, state_dir: str) -> Dict[str, Any]:
    """What a driver is told of host.ini; state_dir: where it may keep what it prints, '' for nowhere."""
    return {'network': dict(vars(settings.Network)), 'remote_desktop': dict(vars(settings.RemoteDesktop)),
            'machine_folder': settings.Hypervisor.machine_folder,
            'broker_hint': broker_hint(settings.Broker.port),
            'chirp_port': CHIRP_PORT, 'state_dir': os.path.abspath(state_dir) if state_dir else '',
            'command_timeout': settings.Hypervisor.command_timeout}


def broker_hint(port: int) -> str:
    """How a VM's firmware tells where the broker is, at the gateway: '' for the port that guests try anyway,
    or one that isn't known before the broker listens."""
    return 'vmhost-port:%d' % port if port not in (0, BROKER_PORT) else ''
