"""Valkey, Redis, and clusters of them: SET, GET, STRLEN and DEL in pipelines.

The package `valkey` (extra `[valkey]`) connects: names, TLS, passwords, hash slots of a cluster.
Once a connection is made, commands and replies go over its socket by `resp.py`: a frame is sent
from the arena's memory and received into it, where the package's own parser copies a value four
times. A value appears whole or not at all, since SET is atomic.
"""

from __future__ import annotations

import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from kvengine.config import Valkey
from kvengine.errors import ConfigError
from kvengine.frame import NEVER, expires_of
from kvengine.tiers.remote import ABSENT, FOREIGN
from kvengine.tiers.resp import Exchange, Piece, Reply, ReplyError, command, strings

if TYPE_CHECKING:
    from valkey.connection import Connection

IDLE_MAX = 32
SCAN_COUNT = 1000
# The store as a whole is not to be used now; other errors are one value's.
AWAY = ("LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH", "WRONGPASS", "NOPERM", "TRYAGAIN")

REFUSED = ("NOAUTH", "WRONGPASS", "NOPERM")

Address = tuple[str, int]
Routed = dict[Address, list[int]]


class ValkeyClient:
    """Connections to one server, or to the nodes of a cluster. Any thread may call any verb.

    Raises ConfigError where the package is missing or the server refuses the password; a server
    that cannot be reached is away, and is tried again by the tier.
    """

    name = "valkey"
    batch_bytes = 64 << 20  # one connection fills a wire, and two of them fight over a core

    def __init__(self, config: Valkey, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        try:
            self._package = import_module("valkey")
            self._slot_of = import_module("valkey.crc").key_slot
        except ImportError as error:
            raise ConfigError(
                "valkey:// needs the package 'valkey', which is not installed: "
                "pip install 'kvengine[valkey]'"
            ) from error
        self._first: Address = (config.host, config.port)
        self._lock = threading.Lock()
        self._idle: dict[Address, list[Connection]] = {}
        self._asking: dict[Address, Connection] = {}  # kept for `sizes`
        self._asking_lock = threading.Lock()
        self._ranges: list[tuple[int, int, Address]] = []
        self._stale = config.cluster
        self._closed = False
        try:
            self.ping(clock() + config.timeout_s)
        except PermissionError as error:
            self.close()
            raise ConfigError(
                f"{config.host}:{config.port} refuses the user or password ({error}): set "
                "KVENGINE_VALKEY_USER and KVENGINE_VALKEY_PASSWORD to what the server expects"
            ) from None
        except OSError:
            pass  # away: the tier tries again

    def get(
        self,
        names: Sequence[str],
        targets: Sequence[memoryview],
        until: float,
        report: Callable[[int, int], None],
    ) -> None:
        """See Client. A value is received into its target; one of another size is read away."""
        keys = [name.encode() for name in names]

        def send(index: int) -> list[Piece]:
            return [b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(keys[index]), keys[index])]

        def read(exchange: Exchange, index: int) -> bool:
            size = exchange.value(targets[index])
            if isinstance(size, ReplyError):
                if self._moved(size):
                    return False
                size = FOREIGN if str(size).startswith("WRONGTYPE") else ABSENT
            report(index, size if size in (ABSENT, len(targets[index])) else FOREIGN)
            return True

        self._each(keys, until, send, read)

    def put(
        self,
        names: Sequence[str],
        values: Sequence[memoryview],
        until: float,
        report: Callable[[int, bool], None],
    ) -> None:
        """See Client. With `ttl_s`, or where its frame says so, a value expires by itself."""
        keys = [name.encode() for name in names]
        ttl_ms = round((self._config.ttl_s or 0) * 1000)

        def send(index: int) -> list[Piece]:
            key, value, life_ms = keys[index], values[index], ttl_ms
            if (expires := expires_of(value)) != NEVER:
                left_ms = max(1, round(1000 * (expires - time.time())))
                life_ms = min(left_ms, ttl_ms) if ttl_ms else left_ms
            life = b"$2\r\nPX\r\n$%d\r\n%d\r\n" % (len(str(life_ms)), life_ms) if life_ms else b""
            head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%s\r\n" % (5 if life else 3, len(key), key)
            return [head + b"$%d\r\n" % len(value), value, b"\r\n" + life]

        def read(exchange: Exchange, index: int) -> bool:
            reply = exchange.reply()
            if isinstance(reply, ReplyError) and self._moved(reply):
                return False
            report(index, reply == b"OK")
            return True

        self._each(keys, until, send, read)

    def sizes(self, names: Sequence[str], until: float) -> list[int]:
        """See Client. One round trip for the table, over connections kept for this."""
        keys = [name.encode() for name in names]
        sizes = [-1] * len(keys)
        routed = self._routed(keys)
        if not self._asking_lock.acquire(timeout=max(0.0, until - self._clock())):
            raise TimeoutError("others are still asking")
        try:
            under_way: list[tuple[Address, Exchange]] = []
            try:
                for address, indices in routed.items():
                    if address not in self._asking:
                        raise ConnectionError(f"no connection to {address[0]}:{address[1]} yet")
                    exchange = self._exchange(self._asking[address], until)
                    exchange.send([b"".join(command(b"STRLEN", keys[at]) for at in indices)])
                    under_way.append((address, exchange))
                for address, exchange in under_way:
                    for at in routed[address]:
                        reply = exchange.reply()
                        if isinstance(reply, ReplyError):
                            self._moved(reply)
                        sizes[at] = reply if isinstance(reply, int) else ABSENT
            except OSError:
                for address in routed:  # replies may be under way
                    if address in self._asking:
                        self._asking.pop(address).disconnect()
                raise
        finally:
            self._asking_lock.release()
        return sizes

    def delete(self, names: Sequence[str], until: float) -> None:
        """See Client."""
        keys = [name.encode() for name in names]

        def read(exchange: Exchange, _: int) -> bool:
            reply = exchange.reply()
            return not (isinstance(reply, ReplyError) and self._moved(reply))

        self._each(keys, until, lambda index: [command(b"DEL", keys[index])], read)

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See Client. SCAN and STRLEN, node by node."""
        self._learn(self._clock() + self._config.timeout_s)
        pattern = re.sub(rb"([*?\[\]\\])", rb"\\\1", prefix.encode()) + b"*"
        for address in {address: None for _, _, address in self._ranges} or {self._first: None}:
            cursor = b"0"
            while True:
                until = self._clock() + self._config.timeout_s
                with self._connection(address, until) as exchange:
                    words = (b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % SCAN_COUNT)
                    exchange.send([command(*words)])
                    found, keys = _scanned(exchange.reply())
                    exchange.send([command(b"STRLEN", key) for key in keys])
                    sizes = [exchange.reply() for _ in keys]
                for key, size in zip(keys, sizes, strict=True):
                    if size != 0:  # expired meanwhile, or empty: a miss either way
                        yield key.decode("latin-1"), size if isinstance(size, int) else -1
                if (cursor := found) == b"0":
                    break

    def ping(self, until: float) -> None:
        """See Client. Learns a cluster's slots where they are not known."""
        self._learn(until)
        addresses = {address for _, _, address in self._ranges} or {self._first}
        for address in addresses:
            with self._asking_lock:
                connection = self._asking.pop(address, None)
            # Not under the lock: whoever asks meanwhile is told at once that none is there.
            connection = connection or self._connect(address, until)
            try:
                exchange = self._exchange(connection, until)
                exchange.send([command(b"PING")])
                reply = exchange.reply()
                if isinstance(reply, ReplyError):
                    refused = str(reply).startswith(REFUSED)
                    raise (PermissionError if refused else ConnectionError)(str(reply))
            except OSError:
                connection.disconnect()
                raise
            with self._asking_lock:
                kept = not self._closed and self._asking.setdefault(address, connection)
            if kept is not connection:
                connection.disconnect()

    def close(self) -> None:
        """See Client."""
        self._closed = True
        with self._asking_lock, self._lock:
            self._disconnect()

    def detach(self) -> None:
        """See Client. The package closes, but does not shut down, what another process opened."""
        self._closed = True
        self._disconnect()

    # Inside

    def _disconnect(self) -> None:
        for connection in [
            *self._asking.values(),
            *(c for idle in self._idle.values() for c in idle),
        ]:
            connection.disconnect()
        self._asking, self._idle = {}, {}

    def _each(
        self,
        keys: Sequence[bytes],
        until: float,
        send: Callable[[int], list[Piece]],
        read: Callable[[Exchange, int], bool],
    ) -> None:
        """Send a command for each key and read its reply, one pipeline a node.

        `read` says False for a key that another node has now: it is asked there, once.
        """
        again = self._pipelines(self._routed(keys), until, send, read)
        if again:
            self._learn(until)
            routed = self._routed([keys[index] for index in again])
            there = {address: [again[at] for at in found] for address, found in routed.items()}
            self._pipelines(there, until, send, read)

    def _pipelines(
        self,
        routed: Routed,
        until: float,
        send: Callable[[int], list[Piece]],
        read: Callable[[Exchange, int], bool],
    ) -> list[int]:
        moved: list[int] = []
        for address, indices in routed.items():
            with self._connection(address, until) as exchange:
                exchange.send(piece for index in indices for piece in send(index))
                moved += [index for index in indices if not read(exchange, index)]
        return moved

    @contextmanager
    def _connection(self, address: Address, until: float) -> Iterator[Exchange]:
        """Lend a connection; it is closed after any error, since replies may be under way."""
        with self._lock:
            idle = self._idle.setdefault(address, [])
            connection = idle.pop() if idle else None
        if connection is not None and _readable(connection):  # closed by the server meanwhile
            connection.disconnect()
            connection = None
        connection = connection or self._connect(address, until)
        try:
            exchange = self._exchange(connection, until)
            yield exchange
        except BaseException:
            connection.disconnect()
            self._stale = self._config.cluster
            raise
        with self._lock:
            if exchange.over() and not self._closed and len(idle) < IDLE_MAX:
                idle.append(connection)
                return
        connection.disconnect()

    def _connect(self, address: Address, until: float) -> Connection:
        """Make a connection and say who we are. Raises OSError."""
        config, module = self._config, self._package.connection
        limit = min(config.timeout_s, until - self._clock())
        if limit <= 0:
            raise TimeoutError("no time to connect")
        kind = module.SSLConnection if config.tls else module.Connection
        options = {"ssl_check_hostname": True} if config.tls else {}
        connection: Connection = kind(
            host=address[0],
            port=address[1],
            db=config.db,
            username=config.user or None,
            password=config.password.decode() if config.password else None,
            socket_timeout=limit,
            socket_connect_timeout=limit,
            lib_name=None,
            lib_version=None,
            **options,
        )
        try:
            connection.connect()
        except self._package.AuthenticationError as error:
            raise PermissionError(str(error)) from error
        except self._package.ValkeyError as error:
            raise ConnectionError(str(error)) from error
        return connection

    def _exchange(self, connection: Connection, until: float) -> Exchange:
        sock = connection._sock
        if sock is None:
            raise ConnectionError("not connected")
        return Exchange(sock, self._clock, self._config.timeout_s, until)

    def _moved(self, error: ReplyError) -> bool:
        """Whether another node has the key. Raises ConnectionError where the server is no use."""
        kind = str(error).partition(" ")[0]
        if kind in AWAY:
            raise ConnectionError(str(error))
        self._stale |= kind == "MOVED"
        return kind == "MOVED"

    def _learn(self, until: float) -> None:
        """Ask a cluster which node has which hash slots, where that is not known."""
        if not self._stale:
            return
        failure: OSError = ConnectionError("no node of the cluster answers")
        for address in {self._first: 0} | {address: 0 for _, _, address in self._ranges}:
            try:
                connection = self._connect(address, until)
            except OSError as error:
                failure = error
                continue
            try:
                exchange = self._exchange(connection, until)
                exchange.send([command(b"CLUSTER", b"SLOTS")])
                self._ranges = _ranges(exchange.reply(), address[0])
                self._stale = False
                return
            except OSError as error:
                failure = error
            finally:
                connection.disconnect()
        raise failure

    def _routed(self, keys: Sequence[bytes]) -> Routed:
        """Group indices of keys by the node that has them."""
        ranges = self._ranges
        if not self._config.cluster:
            return {self._first: list(range(len(keys)))}
        routed: Routed = {}
        for index, key in enumerate(keys):
            slot = self._slot_of(key)
            for first, last, address in ranges:
                if first <= slot <= last:
                    routed.setdefault(address, []).append(index)
                    break
            else:
                raise ConnectionError(f"no node of the cluster has the hash slot {slot}")
        return routed


def _readable(connection: Connection) -> bool:
    """Whether an idle connection has something to read: its end, or what nobody asked for."""
    if connection._sock is None:
        return True
    poll = select.poll()
    poll.register(connection._sock, select.POLLIN)
    return bool(poll.poll(0))


def _scanned(reply: Reply) -> tuple[bytes, list[bytes]]:
    """Read SCAN: the next cursor, and names."""
    if isinstance(reply, ReplyError):
        raise ConnectionError(str(reply))
    cursor, names = strings(reply, 2)[:2]
    found = [name for name in strings(names, 0) if isinstance(name, bytes)]
    if not isinstance(cursor, bytes):
        raise ConnectionError("a reply to SCAN without a cursor")
    return cursor, found


def _ranges(reply: Reply, host: str) -> list[tuple[int, int, Address]]:
    """Read CLUSTER SLOTS: (first slot, last slot, address of the primary)."""
    if isinstance(reply, ReplyError):
        raise ConnectionError(f"no cluster: {reply}")
    found = []
    for item in strings(reply, 0):
        first, last, primary = strings(item, 3)[:3]
        name, port = strings(primary, 2)[:2]
        if not (isinstance(first, int) and isinstance(last, int) and isinstance(port, int)):
            raise ConnectionError("a list of hash slots that cannot be read")
        # A node that does not know its own name says none: it is the one that was asked.
        found.append(
            (
                first,
                last,
                (
                    name.decode("utf-8", "replace") if isinstance(name, bytes) and name else host,
                    port,
                ),
            )
        )
    return found
