"""The daemon of a host: one process that keeps blocks for all the others.

A thread waits for what clients say and answers it (kvengine.peer.service decides what); a few more
do what may take its time; one serves /livez, /readyz and /metrics on loopback. Bytes of blocks go
through none of them: clients map the memory. Started by `kvengine serve`.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import resource
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from kvengine.config import Config
from kvengine.errors import ConfigError, DirectoryInUse
from kvengine.metrics import text_of
from kvengine.peer import messages as m
from kvengine.peer.service import Action, End, Forget, Later, Peer, Send, Service
from kvengine.residents import Residents, label
from kvengine.tenants import Tenants
from kvengine.workers import Workers

CONNECTIONS_MAX = 2048
STRANGERS_MAX = 64  # connections that have not said who they are: the oldest makes room
STRANGER_BYTES_MAX = 1 << 16  # what one of those, or one that only listens, may say at once
DESCRIPTORS_MIN = 8192
HTTP_MAX, HTTP_S = 32, 5.0  # watchers at once, and how long one may take
UNSENT_BYTES_MAX = 4 << 20  # of a client that does not read its answers: it is disconnected
RECEIVE_BYTES = 1 << 18
SOCKET_BYTES = 1 << 20
READS_MAX = 4  # of one connection, before the others have their turn
WORKERS = 4
LOOKS = (m.Match, m.Probe, m.Contains)
DRAIN_S = 10.0
BALANCE_S = 0.25
SO_PEERPIDFD = 77  # Linux 6.5


@dataclass(slots=True, eq=False)
class Connection:
    """One client's socket. Nothing is read from it while it is `held`."""

    number: int
    socket: socket.socket
    process: int
    inbox: bytearray = field(default_factory=bytearray)
    outbox: deque[tuple[memoryview, list[int]]] = field(default_factory=deque)
    unsent: int = 0
    held: int = 0
    ending: bool = False
    waiting: deque[bytes] = field(default_factory=deque)
    interest: int = select.EPOLLIN
    most: int = STRANGER_BYTES_MAX


class Server:
    """Serve engines to the other processes of this host, until `stop`.

    `path` is the socket. Raises ConfigError where it cannot be made, DirectoryInUse where another
    daemon serves it. `tenants`: those that the disk tier's directory has if None.
    """

    def __init__(
        self,
        config: Config,
        path: str | Path,
        http_port: int | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        self.path = Path(path)
        self._residents = Residents(config, tenants)
        self.service = Service(self._residents.admit, os.urandom)
        self._stopping = threading.Event()
        self._ready = self._closed = False
        self._done: deque[tuple[Later, int | None]] = deque()  # work that has ended
        self._connections: dict[int, Connection] = {}  # by descriptor
        self._by_number: dict[int, Connection] = {}
        self._processes: dict[int, int] = {}  # pidfd by number
        self._watched: dict[int, int] = {}  # number by pidfd
        self._numbers = 0
        self._strangers: dict[int, Connection] = {}  # by number, the oldest first
        self._coder = m.Coder()
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._balancing = False
        self._balance_at = 0.0
        _raise_descriptors()
        self._lock = _lock(self.path)
        try:
            self._listener = _listener(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._epoll = select.epoll()
            self._epoll.register(self._listener, select.EPOLLIN)
            self._epoll.register(self._wake_in, select.EPOLLIN)
            self._workers = Workers(WORKERS, "kvengine-serve", self._failed)
            self._http = _serve_http(self, http_port) if http_port is not None else None
            self._residents.balance()
            self._ready = True
        except BaseException:
            self._residents.close()
            self._listener.close()
            os.close(self._lock)
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Tenants

    def _balance(self, now: float) -> None:
        """See to tenants that come and go, and to who holds how much memory, now and then."""
        self._balance_at = now + BALANCE_S
        for tenant in self._residents.gone():
            self._act(self.service.dismiss(tenant, now))
        if not self._balancing:
            self._balancing = True

            def work() -> None:
                try:
                    self._residents.balance()
                finally:
                    self._balancing = False

            self._workers.submit(work)

    # Running

    @property
    def port(self) -> int | None:
        """Where /livez, /readyz and /metrics are; None where they are not served."""
        return None if self._http is None else int(self._http.server_address[1])

    def reasons(self) -> list[str]:
        """Say why the daemon is not ready, [] if it is."""
        found = [] if self._ready else ["starting: what the tiers hold is being read"]
        if self._stopping.is_set():
            found.append("stopping")
        for name, engine in self._residents.engines().items():
            found += [f"{name}: {tier} is away" for tier in engine.away()]
        return found

    def metrics(self) -> bytes:
        """Give the metrics of all tenants in the Prometheus text format, by hashed names."""
        engines = self._residents.engines()
        for engine in engines.values():
            engine.stats()
        return text_of({label(name): engine.metrics for name, engine in engines.items()})

    def run(self) -> None:
        """Serve until `stop`; then let saves under way end, write what is committed, close."""
        while not self._stopping.is_set():
            self._turn()
        self.service.draining = True
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end and self._filling():
            self._turn(0.05)
        self.close()

    def stop(self) -> None:
        """End `run` soon. May be called from any thread, and from a signal's handler."""
        self._stopping.set()
        self._wake()

    def close(self) -> None:
        """End all connections and engines, and remove the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._ready = False
        self._stopping.set()
        for connection in list(self._connections.values()):
            self._close(connection)
        self._workers.close(DRAIN_S)
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        self._residents.close()
        for fd in self._processes.values():
            os.close(fd)
        self._processes, self._watched = {}, {}
        self._listener.close()
        self._epoll.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        self.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _filling(self) -> bool:
        return any(session.reservations for session in self.service.sessions if not session.lost)

    def _failed(self, error: Exception) -> None:
        for engine in self._residents.engines().values():
            engine.metrics.add("tier_failures", 1, tier="daemon")

    def _turn(self, wait_s: float = math.inf) -> None:
        """Wait for what comes next, and see to all that has come."""
        now = time.monotonic()
        if self._balance_at <= now:
            self._balance(now)
        wait_s = min(wait_s, self.service.next_tick - now, self._balance_at - now)
        for fd, event in self._epoll.poll(max(0.0, wait_s)):
            if (connection := self._connections.get(fd)) is not None:
                if event & (select.EPOLLHUP | select.EPOLLERR) and connection.held:
                    self._close(connection)  # nobody waits for the answer
                elif event & ~select.EPOLLOUT:
                    self._read(connection)
                if event & select.EPOLLOUT and fd in self._connections:
                    self._write(connection)
            elif fd == self._listener.fileno():
                self._accept()
            elif fd == self._wake_in:
                _drain(fd)
            elif fd in self._watched:
                process = self._watched[fd]
                self._act(self.service.exited(process, time.monotonic()))
                self._forget(process)
        while self._done:
            later, held = self._done.popleft()
            self._act(later.then(time.monotonic()))
            if held is not None and (connection := self._by_number.get(held)) is not None:
                connection.held -= 1
                self._take(connection)
        if self.service.next_tick <= (now := time.monotonic()):
            self._act(self.service.tick(now))

    def _wake(self) -> None:
        try:
            os.write(self._wake_out, b"\0")
        except OSError:
            pass  # it is full: the loop will wake all the same; or closed: there is none

    # Connections

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has gone already, or there are no descriptors left
        client.setblocking(False)
        if len(self._connections) >= CONNECTIONS_MAX:
            client.close()
            return
        if len(self._strangers) >= STRANGERS_MAX:
            self._close(next(iter(self._strangers.values())))
        pid, uid, gid = struct.unpack(
            "3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        try:
            pidfd = _pidfd(client, pid)
        except OSError:
            client.close()  # it cannot be seen when it ends: what it holds could never be freed
            return
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._numbers += 1
        connection = Connection(self._numbers, client, self._numbers)
        self._connections[client.fileno()] = self._by_number[connection.number] = connection
        self._processes[connection.process], self._watched[pidfd] = pidfd, connection.process
        self._strangers[connection.number] = connection
        self._epoll.register(client, select.EPOLLIN)
        self._epoll.register(pidfd, select.EPOLLIN)
        peer = Peer(connection.process, pid, uid, gid)
        self._act(self.service.connected(connection.number, peer))

    def _close(self, connection: Connection) -> None:
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        del self._by_number[connection.number]
        self._strangers.pop(connection.number, None)
        for _, descriptors in connection.outbox:
            _close_all(descriptors)
        connection.outbox.clear()
        self._epoll.unregister(fd)
        connection.socket.close()
        self._act(self.service.closed(connection.number, time.monotonic()))

    def _forget(self, process: int) -> None:
        pidfd = self._processes.pop(process, None)
        if pidfd is not None:
            del self._watched[pidfd]
            self._epoll.unregister(pidfd)
            os.close(pidfd)

    def _read(self, connection: Connection) -> None:
        for _ in range(READS_MAX):
            if connection.held or connection.ending or connection.number not in self._by_number:
                return
            try:
                count = connection.socket.recv_into(self._received)
            except BlockingIOError:
                return
            except OSError:
                count = 0
            if not count:
                self._close(connection)
                return
            try:
                connection.inbox += self._received[:count]
                found, connection.inbox = m.split(connection.inbox, connection.most)
            except m.Wrong:
                self._close(connection)
                return
            connection.waiting.extend(found)
            self._take(connection)
            if count < RECEIVE_BYTES:
                return

    def _take(self, connection: Connection) -> None:
        """Answer messages that have come, until one of them is to be waited for.

        Releases that come with a look-up are taken after it: nobody waits for them.
        """
        late: list[m.Release] = []
        while connection.waiting and not connection.held and not connection.ending:
            try:
                message = self._coder.request(connection.waiting.popleft())
            except m.Wrong:
                self._close(connection)
                return
            if isinstance(message, m.Release):
                late.append(message)
                continue
            if late and not isinstance(message, LOOKS):
                late = self._receive(connection, late)
            self._receive(connection, [message])
            if connection.number not in self._by_number:
                return
        if late:
            self._receive(connection, late)
        self._listen(connection)

    def _receive(self, connection: Connection, messages: Sequence[m.Request]) -> list[m.Release]:
        """Have messages answered; returns an empty list. A fault ends the connection alone."""
        try:
            for message in messages:
                self._act(self.service.received(connection.number, message, time.monotonic()))
        except Exception as error:  # the daemon is there for the others
            self._failed(error)
            self._close(connection)
        return []

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Later():
                    self._begin(action)
                case End():
                    connection = self._by_number.get(action.connection)
                    if connection is not None:
                        connection.ending = True
                        if not connection.outbox:
                            self._close(connection)
                case Forget():
                    self._forget(action.process)

    def _begin(self, later: Later) -> None:
        held = later.connection
        connection = None if held is None else self._by_number.get(held)
        if connection is not None:
            connection.held += 1

        def done() -> None:
            self._done.append((later, None if connection is None else held))
            self._wake()

        self._workers.submit(partial(later.start, done))

    def _send(self, action: Send) -> None:
        connection = self._by_number.get(action.connection)
        if connection is None:
            return
        self._strangers.pop(connection.number, None)
        descriptors: list[int] = []
        if action.memory is not None:
            descriptors = self._residents.descriptors(action.memory, action.writable)
            connection.most = m.MESSAGE_BYTES_MAX
            if not descriptors:
                self._close(connection)  # the tenant has been removed just now
                return
        data = memoryview(self._coder.frame(action.message))
        connection.outbox.append((data, descriptors))
        connection.unsent += len(data)
        self._write(connection)

    def _write(self, connection: Connection) -> None:
        outbox = connection.outbox
        try:
            while outbox:
                data, descriptors = outbox[0]
                if descriptors:
                    sent = socket.send_fds(connection.socket, [data], descriptors)
                else:
                    sent = connection.socket.send(data)
                _close_all(descriptors)
                connection.unsent -= sent
                if sent == len(data):
                    outbox.popleft()
                else:
                    outbox[0] = (data[sent:], [])
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        if connection.unsent > UNSENT_BYTES_MAX or (connection.ending and not outbox):
            self._close(connection)
            return
        self._listen(connection)

    def _listen(self, connection: Connection) -> None:
        """Wait for what a connection can do now."""
        interest = select.EPOLLOUT if connection.outbox else 0
        if not connection.held and not connection.ending:
            interest |= select.EPOLLIN
        if interest != connection.interest and connection.number in self._by_number:
            connection.interest = interest
            self._epoll.modify(connection.socket, interest)


def _lock(path: Path) -> int:
    """Take the lock that says who serves a socket; it ends with the process."""
    try:
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the socket {path} cannot be made: {error.strerror}; name one in a directory that "
            "exists and that this user may write"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise DirectoryInUse(
            f"another daemon serves {path}: stop it, or name another socket"
        ) from None
    return handle


def _listener(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # one that an earlier daemon has left: the lock is ours
        found.bind(str(path))
        os.chmod(path, 0o666)  # whoever connects is asked who they are
        found.listen(256)
        found.setblocking(False)
    except OSError as error:
        found.close()
        raise ConfigError(f"the socket {path} cannot be made: {error.strerror}") from None
    return found


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _raise_descriptors() -> None:
    """Have descriptors enough for all connections, each of which takes two, and for tiers."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = DESCRIPTORS_MIN if most == resource.RLIM_INFINITY else min(DESCRIPTORS_MIN, most)
    if soft != resource.RLIM_INFINITY and soft < want:
        resource.setrlimit(resource.RLIMIT_NOFILE, (want, most))


def _pidfd(client: socket.socket, pid: int) -> int:
    """Return a descriptor that tells when the process at the other end ends."""
    try:
        packed = client.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return int(struct.unpack("i", packed)[0])
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise  # it has ended: its number may be another's now
        return os.pidfd_open(pid)


def _drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


def _serve_http(server: Server, port: int) -> ThreadingHTTPServer:
    """Serve what watchers and scrapers ask for, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        timeout = HTTP_S

        def do_GET(self) -> None:
            status, kind, body = 200, "text/plain; charset=utf-8", b"ok\n"
            if self.path == "/readyz":
                if reasons := server.reasons():
                    status, body = 503, "".join(f"{each}\n" for each in reasons).encode()
            elif self.path == "/metrics":
                kind, body = "text/plain; version=0.0.4; charset=utf-8", server.metrics()
            elif self.path != "/livez":
                status, body = 404, b"known are /livez, /readyz and /metrics\n"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    turns = threading.BoundedSemaphore(HTTP_MAX)

    class Watched(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 2 * HTTP_MAX

        def process_request(self, request: Any, client_address: Any) -> None:
            if turns.acquire(blocking=False):
                super().process_request(request, client_address)
            else:
                self.shutdown_request(request)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                turns.release()

    try:
        found = Watched(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port} of 127.0.0.1 cannot be used: {error.strerror}") from None
    threading.Thread(target=found.serve_forever, name="kvengine-http", daemon=True).start()
    return found
