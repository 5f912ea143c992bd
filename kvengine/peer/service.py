"""What the daemon answers to its clients: a pure state machine over the verbs of stores.

Events and the time come in, actions go out; no socket, clock, thread or lock is here, so that a
simulation drives it in virtual time. The README beside this file says what is promised. Called by
kvengine.server, from one thread.

A session is one client: two connections, its leases, its reservations. It is lost when a connection
ends without Bye; what its process may still read or write stays held (reserved keys are free for
others at once), until the process has exited, or says in a later session that it has settled.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s
from kvengine.config import Config
from kvengine.errors import ConfigError, KVEngineError, LayoutError
from kvengine.keys import BlockKeys, Namespace
from kvengine.layout import Layout
from kvengine.lease import Bools, Lease, Reservation
from kvengine.peer import messages as m
from kvengine.policy import Request
from kvengine.retention import Retention
from kvengine.shares import Limits
from kvengine.store import Store

Found = TypeVar("Found")
SESSIONS_MAX = 1024
SESSIONS_SHARE = 4  # a tenant has at most this part of them
DEADLINES_SPARE = 1 << 12
LEASES_MAX = 1 << 14  # of a session
RESERVATIONS_MAX = 1 << 12
SPACES_MAX = 1 << 12
READS_ONLY = "this client only reads: it may change nothing of the tenant's"
TOO_MUCH = "the tenant asks for more than its quota lets through"


class House(Protocol):
    """What the service asks of the engine of one tenant. Any thread may call any verb."""

    tenant: str
    config: Config

    @property
    def store(self) -> Store: ...
    @property
    def asks(self) -> bool:
        """Whether a look-up may wait for the answer of a remote tier."""
        ...

    def is_current(self, namespace: Namespace) -> bool:
        """Say whether nobody has dropped all blocks of a namespace since it was opened."""
        ...

    def space(
        self, identity: Mapping[str, str], layout: Layout, smaller: bool, ttl_s: float | None
    ) -> tuple[Namespace, list[int]]:
        """Return a namespace of this tenant and the numbers of its forms.

        Raises KVEngineError for what does not fit.
        """
        ...

    def probe(self, keys: BlockKeys) -> int: ...
    def contains(self, keys: BlockKeys) -> Bools: ...
    def match(
        self, keys: BlockKeys, *, split: bool = False, request: Request | None = None
    ) -> Lease: ...
    def committed(self, keys: BlockKeys, count: int) -> None:
        """Note a commit of so many blocks: write them below, make room for as many."""
        ...

    def fetch(self, ids: Int32s, timeout_s: float, ready: Callable[[], None]) -> None:
        """Read pinned blocks into memory; call `ready` once, from any thread."""
        ...

    def ahead(self, ids: Int32s) -> None:
        """Read pinned blocks into memory, ahead of need."""
        ...

    def keep(self, keys: BlockKeys, new: Bools, asked: Retention) -> int: ...
    def hint(
        self,
        keys: BlockKeys,
        *,
        session_end: bool = False,
        branch_done: bool = False,
        expect_resume_in: float | None = None,
    ) -> int: ...
    def pin(
        self, keys: BlockKeys, duration_s: float | None = None, *, hard: bool = False
    ) -> int: ...
    def unpin(self, keys: BlockKeys) -> int: ...
    def drop(self, keys: BlockKeys) -> int: ...
    def drop_all(self) -> int: ...
    def squeeze(self, nbytes: int) -> int: ...
    def stats(self) -> dict[str, int]: ...
    def observe_prefill(
        self, namespace: Namespace, position: int, tokens: int, seconds: float
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection, as the kernel says. `process`: our number for it."""

    process: int
    pid: int
    uid: int
    gid: int


# What changes what others find, or what they are told.
CHANGES = (
    m.Reserve,
    m.Corrupt,
    m.Widen,
    m.Keep,
    m.Hint,
    m.Pin,
    m.Unpin,
    m.Drop,
    m.DropAll,
    m.Squeeze,
    m.Observe,
)

# Actions.


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; with the descriptors of a tenant's memory where `memory` is given."""

    connection: int
    message: m.Answer
    memory: House | None = None
    writable: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """Close a connection, after what was to be sent."""

    connection: int


@dataclass(frozen=True, slots=True)
class Later:
    """Call `start` on another thread; once it calls what it is given, call `then` on this one.

    `then` is given the time and returns actions. No message of `connection` is taken meanwhile.
    """

    start: Callable[[Callable[[], None]], None]
    then: Callable[[float], list[Action]]
    connection: int | None = None


@dataclass(frozen=True, slots=True)
class Forget:
    """Watch a process no more."""

    process: int


Action = Send | End | Later | Forget


class Admitted(NamedTuple):
    """Whose blocks a client may use, whether it may save, and how much it may ask for."""

    house: House
    writable: bool
    limits: Limits


# Says what a client may do with a tenant's blocks, or why nothing.
Admit = Callable[[Peer, str, bytes], Admitted | str]


@dataclass(slots=True, eq=False)
class Session:
    """One client. `connections`: the one that asks, and the one that listens."""

    token: bytes
    house: House
    peer: Peer
    writable: bool
    limits: Limits
    connections: list[int]
    spaces: dict[int, Namespace] = field(default_factory=dict)
    leases: dict[bytes, Lease] = field(default_factory=dict)
    reservations: dict[bytes, Reservation] = field(default_factory=dict)
    fetching: int = 0
    lost: bool = False


class Service:
    """See the module. `draw` gives random bytes; `incarnation` tells one daemon from the next."""

    def __init__(self, admit: Admit, draw: Callable[[int], bytes]) -> None:
        self._admit = admit
        self._draw = draw
        self.incarnation = draw(m.TOKEN_BYTES)
        self.draining = False
        self._peers: dict[int, Peer] = {}  # of connections that have not said who they are
        self._sessions: dict[int, Session] = {}  # by connection
        self._by_token: dict[bytes, Session] = {}
        self._owners: dict[bytes, Session] = {}  # of leases, by token
        self._deadlines: list[tuple[float, bytes, bytes]] = []  # when, session, token
        self._deadlines_max = DEADLINES_SPARE
        self._verbs: dict[type, Callable[..., list[Action]]] = {
            m.Open: self._open,
            m.Probe: self._probe,
            m.Contains: self._contains,
            m.Match: self._match,
            m.Release: self._release,
            m.Adopt: self._adopt,
            m.Fetch: self._fetch,
            m.Reserve: self._reserve,
            m.Commit: self._commit,
            m.Abort: self._abort,
            m.Corrupt: self._corrupt,
            m.Keep: self._keep,
            m.Hint: self._hint,
            m.Pin: self._pin,
            m.Unpin: self._unpin,
            m.Drop: self._drop,
            m.DropAll: self._drop_all,
            m.Stats: self._stats,
            m.IsClean: self._is_clean,
            m.Squeeze: self._squeeze,
            m.Observe: self._observe,
            m.Settled: self._settled,
            m.Bye: self._bye,
            m.Widen: self._widen,
        }

    # Events

    def connected(self, connection: int, peer: Peer) -> list[Action]:
        """Take in a connection."""
        self._peers[connection] = peer
        return []

    def received(self, connection: int, message: m.Request, now: float) -> list[Action]:
        """Answer a message."""
        session = self._sessions.get(connection)
        if session is None:
            return self._greet(connection, message)
        if session.lost:
            # Sent before its process ended, or beside the other connection: nobody would give back
            # what it is lent now.
            return [End(connection)]
        verb = self._verbs.get(type(message))
        if verb is None or connection != session.connections[0]:
            return [End(connection)]  # a second Hello, or requests where answers are awaited
        if not session.writable and isinstance(message, CHANGES):
            return self._no(session, message, m.READ_ONLY, READS_ONLY) if message.number else []
        return verb(session, message, now)

    def closed(self, connection: int, now: float) -> list[Action]:
        """Note that a connection is gone: its session is lost."""
        peer = self._peers.pop(connection, None)
        session = self._sessions.pop(connection, None)
        if session is None:
            return [] if peer is None else [Forget(peer.process)]
        session.connections.remove(connection)
        found: list[Action] = [End(each) for each in session.connections]
        if not session.lost:
            session.lost = True
            for reservation in session.reservations.values():
                session.house.store.expire(reservation)
        return found + self._maybe_over(session)

    def exited(self, process: int, now: float) -> list[Action]:
        """Note that a process is gone: nothing of it is in use any more.

        Another that has its sockets, a child of it, is no client: they are closed.
        """
        found: list[Action] = []
        for session in list(self._by_token.values()):
            if session.peer.process == process:
                found += [End(each) for each in session.connections]
                found += self._end(session)
        found += [End(each) for each, peer in self._peers.items() if peer.process == process]
        return found

    def tick(self, now: float) -> list[Action]:
        """Tell clients of deadlines that have come. Call at `next_tick` or later."""
        found: list[Action] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, owner, token = heapq.heappop(self._deadlines)
            session = self._by_token.get(owner)
            if session is None or session.lost:
                continue
            reservation = session.reservations.get(token)
            if reservation is not None:
                session.house.store.expire(reservation)
            if (reservation is not None or token in session.leases) and self._listens(session):
                found.append(Send(session.connections[1], m.Expired(0, token)))
        return found

    @property
    def next_tick(self) -> float:
        """When the next deadline comes."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    @property
    def sessions(self) -> Sequence[Session]:
        """Those who are here, and those who are lost and hold something."""
        return tuple(self._by_token.values())

    # Who is there

    def _greet(self, connection: int, message: m.Request) -> list[Action]:
        peer = self._peers.get(connection)
        if peer is None:
            return [End(connection)]
        if isinstance(message, m.Listen):
            return self._listen(connection, peer, message)
        if not isinstance(message, m.Hello):
            return [End(connection)]
        if not message.oldest <= m.VERSION <= message.newest:
            text = (
                f"this daemon speaks version {m.VERSION}, the client {message.oldest} to "
                f"{message.newest}: install the same version of kvengine for both"
            )
            return self._refuse(connection, message, m.VERSIONS, text)
        if self.draining or len(self._by_token) >= SESSIONS_MAX:
            text = "the daemon is stopping" if self.draining else "too many clients"
            return self._refuse(connection, message, m.BUSY, text)
        admitted = self._admit(peer, message.tenant, message.key)
        if isinstance(admitted, str):
            return self._refuse(connection, message, m.TENANT, admitted)
        house, may_write, limits = admitted
        held = sum(each.house is house for each in self._by_token.values())
        if held >= SESSIONS_MAX // SESSIONS_SHARE:
            text = f"this tenant has {held} clients, the most of one tenant: end some"
            return self._refuse(connection, message, m.BUSY, text)
        writable = message.writable and may_write
        del self._peers[connection]
        token = self._draw(m.TOKEN_BYTES)
        session = Session(token, house, peer, writable, limits, [connection])
        self._sessions[connection] = self._by_token[token] = session
        welcome = m.Welcome(
            message.number,
            m.VERSION,
            self.incarnation,
            token,
            house.store.arena.nbytes,
            house.tenant,
            house.config.fetch_s,
            house.config.populate and house.store.arena.is_whole,
            writable,
        )
        return [Send(connection, welcome, house, writable)]

    def dismiss(self, tenant: str, now: float) -> list[Action]:
        """End all connections of a tenant that is served no more."""
        found: list[Action] = []
        for connection, session in list(self._sessions.items()):
            if session.house.tenant == tenant:
                found.append(End(connection))
        return found

    def _listen(self, connection: int, peer: Peer, message: m.Listen) -> list[Action]:
        session = self._by_token.get(message.session)
        if session is None or session.lost or self._listens(session):
            return [End(connection)]
        if (peer.pid, peer.uid) != (session.peer.pid, session.peer.uid):
            return [End(connection)]
        del self._peers[connection]
        session.connections.append(connection)
        self._sessions[connection] = session
        return [Forget(peer.process), Send(connection, m.Done(message.number))]

    def _listens(self, session: Session) -> bool:
        return len(session.connections) > 1

    def _refuse(self, connection: int, message: m.Message, code: str, text: str) -> list[Action]:
        return [Send(connection, m.Refused(message.number, code, text)), End(connection)]

    # match → use → release

    def _open(self, session: Session, message: m.Open, now: float) -> list[Action]:
        house = session.house
        ttl_s = message.ttl_s if session.writable else None
        if len(session.spaces) >= SPACES_MAX:
            return self._no(session, message, m.BUSY, "too many namespaces")

        def call() -> tuple[Namespace, list[int]] | KVEngineError:
            try:
                layout = msgspec.convert(message.layout, Layout)
                return house.space(_identity(message), layout, message.smaller, ttl_s)
            except msgspec.ValidationError as error:
                return LayoutError(f"the layout that a client gives: {error}")
            except KVEngineError as error:
                return error

        def answer(made: tuple[Namespace, list[int]] | KVEngineError) -> m.Answer:
            if isinstance(made, KVEngineError):
                return m.Refused(message.number, m.LAYOUT, str(made))
            space, numbers = made
            for number in numbers:
                session.spaces[number] = space
            return m.Opened(message.number, space.root, space.identity.epoch, numbers)

        return self._work(session, message, call, answer)

    def _probe(self, session: Session, message: m.Probe, now: float) -> list[Action]:
        house, keys = session.house, self._asked(session, message, now)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        return self._look_up(
            session, message, lambda: house.probe(keys), lambda n: m.Count(message.number, n)
        )

    def _contains(self, session: Session, message: m.Contains, now: float) -> list[Action]:
        house, keys = session.house, self._asked(session, message, now)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        return self._look_up(
            session,
            message,
            lambda: house.contains(keys),
            lambda held: m.Which(message.number, held.tobytes()),
        )

    def _match(self, session: Session, message: m.Match, now: float) -> list[Action]:
        house, keys = session.house, self._asked(session, message, now)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        if len(session.leases) >= LEASES_MAX:
            return self._no(session, message, m.BUSY, "too many leases: release some")
        tokens = keys.namespace.layout.block_tokens
        request = Request(message.output_tokens, message.stop, tokens)

        def answer(lease: Lease) -> m.Answer:
            return self._leased(session, message, lease, now)

        return self._look_up(
            session,
            message,
            lambda: house.match(keys, split=message.split, request=request),
            answer,
        )

    def _leased(self, session: Session, message: m.Message, lease: Lease, now: float) -> m.Leased:
        """Enter a lease, and say where its blocks lie."""
        if session.lost:
            lease.release()
        elif lease.blocks:
            session.leases[lease.token] = lease
            self._owners[lease.token] = session
            self._remind(now + session.house.config.lease_s, session, lease.token)
        store = session.house.store
        slots, numbers = store.places(lease.ids)
        usual = lease.keys.namespace.number
        forms = b""
        if (numbers != usual).any():
            forms = (numbers & 1).astype(np.uint8).tobytes()
        return m.Leased(
            message.number,
            lease.token,
            session.house.config.lease_s,
            lease.in_memory,
            slots.tobytes(),
            forms,
            store.arena.generation(slots).tobytes(),
            lease.worth.start,
            lease.worth.stop,
        )

    def _release(self, session: Session, message: m.Release, now: float) -> list[Action]:
        for token in _tokens(message.tokens):
            lease = session.leases.pop(token, None)
            if lease is not None:
                del self._owners[token]
                lease.release()
        return []

    def _adopt(self, session: Session, message: m.Adopt, now: float) -> list[Action]:
        other = self._owners.get(message.token)
        if other is None or other.house is not session.house or other.lost:
            return self._no(session, message, m.STALE, "no such lease: it has ended")
        if len(session.leases) >= LEASES_MAX:
            return self._no(session, message, m.BUSY, "too many leases: release some")
        found = other.leases[message.token]
        keys = found.keys
        lease = session.house.store.share(found)
        session.spaces[keys.namespace.number] = keys.namespace
        leased = self._leased(session, message, lease, now)
        adopted = m.Adopted(
            message.number,
            leased,
            keys.namespace.number,
            keys.data[: lease.blocks * m.KEY_BYTES],
            keys.position,
            keys.parent,
        )
        return self._say(session, adopted)

    def _fetch(self, session: Session, message: m.Fetch, now: float) -> list[Action]:
        lease, house = session.leases.get(message.token), session.house
        rows = np.frombuffer(message.rows[: len(message.rows) & ~3], dtype="<i4")
        if lease is None or not _inside(rows, lease.blocks):
            return self._hear(session, m.Fetched(message.number, b"", b""))
        ids = lease.ids[rows]
        if not message.number:
            house.ahead(ids)
            return []
        if session.fetching >= LEASES_MAX:
            return self._hear(session, m.Fetched(message.number, b"", b""))
        session.fetching += 1
        house.store.repin(ids)
        timeout_s = min(message.timeout_s, house.config.fetch_s)

        def start(done: Callable[[], None]) -> None:
            house.fetch(ids, timeout_s, done)

        def then(now: float) -> list[Action]:
            session.fetching -= 1
            slots, _ = house.store.places(ids)
            generations = house.store.arena.generation(slots)
            house.store.unpin(ids)
            fetched = m.Fetched(message.number, slots.tobytes(), generations.tobytes())
            return self._hear(session, fetched)

        return [Later(start, then)]

    def _corrupt(self, session: Session, message: m.Corrupt, now: float) -> list[Action]:
        lease = session.leases.get(message.token)
        rows = np.frombuffer(message.rows[: len(message.rows) & ~3], dtype="<i4")
        if lease is not None and _inside(rows, lease.blocks):
            session.house.store.corrupt(lease.ids[rows], None)
        return []

    # reserve → fill → commit

    def _reserve(self, session: Session, message: m.Reserve, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        if len(session.reservations) >= RESERVATIONS_MAX or self.draining:
            return self._no(session, message, m.BUSY, "no more reservations are taken now")
        group = None
        if message.fill:
            first, end, head, head_end = message.part
            try:
                part = keys.namespace.part(layers=(first, end), heads=(head, head_end))
            except LayoutError as error:
                return self._no(session, message, m.LAYOUT, str(error))
            if not part.view.mask:
                return self._no(session, message, m.LAYOUT, f"{part.view.part} is no whole parts")
            keys, group = replace(keys, namespace=part), message.fill
        form = house.store.form(keys.namespace, message.space)
        if not session.limits.allows(0, len(keys) * form.nbytes, now):
            return self._no(session, message, m.BUSY, TOO_MUCH)
        made = house.store.reserve(keys, form, group)
        if len(made):
            session.reservations[made.token] = made
            self._remind(now + house.config.reservation_s, session, made.token)
        reserved = m.Reserved(
            message.number,
            made.token,
            made.fill,
            house.config.reservation_s,
            made.indices.astype("<i4").tobytes(),
            made.slots.tobytes(),
            made.held.tobytes(),
        )
        return self._say(session, reserved)

    def _commit(self, session: Session, message: m.Commit, now: float) -> list[Action]:
        made = session.reservations.pop(message.token, None)
        good = np.frombuffer(message.good, dtype=np.uint8) == 1
        if made is None or len(good) != len(made):
            if made is not None:
                session.house.store.abort(made)
            return self._say(session, m.Count(message.number, 0))
        count = session.house.store.commit(made, good)
        said = self._say(session, m.Count(message.number, count))
        if not count:
            return said
        house, keys = session.house, made.keys

        def start(done: Callable[[], None]) -> None:
            try:
                house.committed(keys, count)
            finally:
                done()

        return [*said, Later(start, lambda now: [])]

    def _abort(self, session: Session, message: m.Abort, now: float) -> list[Action]:
        for token in _tokens(message.tokens):
            made = session.reservations.pop(token, None)
            if made is not None:
                session.house.store.abort(made)
        return []

    def _widen(self, session: Session, message: m.Widen, now: float) -> list[Action]:
        size = m.KEY_BYTES
        keys = [message.keys[at : at + size] for at in range(0, len(message.keys), size)]
        session.house.store.widen([key for key in keys if len(key) == size])
        return []

    # Keeping house

    def _keep(self, session: Session, message: m.Keep, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        new = np.frombuffer(message.new, dtype=np.uint8) == 1
        try:
            asked = Retention(message.level, message.duration_s, message.ttl_s)
        except ConfigError as error:
            return self._no(session, message, m.LAYOUT, str(error))
        count = house.keep(keys, new, asked) if len(new) == len(keys) else 0
        return self._say(session, m.Count(message.number, count))

    def _hint(self, session: Session, message: m.Hint, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        try:
            if message.resume_s:
                count = house.hint(keys, expect_resume_in=message.resume_s)
            elif message.branch:
                count = house.hint(keys, branch_done=True)
            else:
                count = house.hint(keys, session_end=True)
        except ConfigError as error:
            return self._no(session, message, m.LAYOUT, str(error))
        return self._say(session, m.Count(message.number, count))

    def _pin(self, session: Session, message: m.Pin, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        duration_s = message.duration_s or None
        try:
            count = house.pin(keys, duration_s, hard=duration_s is None)
        except ConfigError as error:
            return self._no(session, message, m.LAYOUT, str(error))
        return self._say(session, m.Count(message.number, count))

    def _unpin(self, session: Session, message: m.Unpin, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        return self._say(session, m.Count(message.number, house.unpin(keys)))

    def _drop(self, session: Session, message: m.Drop, now: float) -> list[Action]:
        house, keys = session.house, self._keys(session, message)
        if isinstance(keys, m.Refused):
            return self._say(session, keys)
        return self._work(
            session, message, lambda: house.drop(keys), lambda n: m.Count(message.number, n)
        )

    def _drop_all(self, session: Session, message: m.DropAll, now: float) -> list[Action]:
        house = session.house
        return self._work(session, message, house.drop_all, lambda n: m.Count(message.number, n))

    def _stats(self, session: Session, message: m.Stats, now: float) -> list[Action]:
        house = session.house
        return self._work(session, message, house.stats, lambda c: m.Facts(message.number, c))

    def _is_clean(self, session: Session, message: m.IsClean, now: float) -> list[Action]:
        clean = session.house.store.wait_clean(0.0)
        return self._say(session, m.Count(message.number, int(clean)))

    def _squeeze(self, session: Session, message: m.Squeeze, now: float) -> list[Action]:
        house, nbytes = session.house, max(0, message.nbytes)
        return self._work(
            session,
            message,
            lambda: house.squeeze(nbytes),
            lambda n: m.Count(message.number, n),
        )

    def _observe(self, session: Session, message: m.Observe, now: float) -> list[Action]:
        space = session.spaces.get(message.space)
        if space is not None and message.tokens and 0 < message.seconds < 1e6:
            session.house.observe_prefill(space, message.position, message.tokens, message.seconds)
        return self._say(session, m.Done(message.number))

    def _settled(self, session: Session, message: m.Settled, now: float) -> list[Action]:
        old = self._by_token.get(message.session)
        found = self._say(session, m.Done(message.number)) if message.number else []
        if old is None or not old.lost or old.house is not session.house:
            return found
        return found + self._end(old) if old.peer.pid == session.peer.pid else found

    def _bye(self, session: Session, message: m.Bye, now: float) -> list[Action]:
        connections = list(session.connections)
        found = self._say(session, m.Done(message.number)) + self._end(session)
        return found + [End(each) for each in connections]

    # Inside

    def _remind(self, when: float, session: Session, token: bytes) -> None:
        """Note a deadline. Those of what has ended are forgotten once they are the most."""
        heapq.heappush(self._deadlines, (when, session.token, token))
        if len(self._deadlines) > self._deadlines_max:
            self._deadlines = [each for each in self._deadlines if self._is_due(*each[1:])]
            heapq.heapify(self._deadlines)
            self._deadlines_max = 2 * len(self._deadlines) + DEADLINES_SPARE

    def _is_due(self, owner: bytes, token: bytes) -> bool:
        session = self._by_token.get(owner)
        return session is not None and (token in session.leases or token in session.reservations)

    def _asked(self, session: Session, message: m.Table, now: float) -> BlockKeys | m.Refused:
        """Read a table of keys that is looked up, unless its tenant looks up too many."""
        if not session.limits.allows(len(message.keys) // m.KEY_BYTES, 0, now):
            return m.Refused(message.number, m.BUSY, TOO_MUCH)
        return self._keys(session, message)

    def _keys(self, session: Session, message: m.Table) -> BlockKeys | m.Refused:
        """Read a table of keys. Only namespaces that this session has opened are known to it."""
        space = session.spaces.get(message.space)
        if space is None:
            return m.Refused(message.number, m.SPACE, "a namespace that was not opened here")
        if len(message.keys) % m.KEY_BYTES:
            return m.Refused(message.number, m.LAYOUT, "keys have 32 bytes each")
        if not session.house.is_current(space):
            return m.Refused(message.number, m.STALE, "the tenant's blocks have been dropped")
        return BlockKeys(space, message.keys, message.position, message.parent)

    def _say(self, session: Session, answer: m.Answer) -> list[Action]:
        return [Send(session.connections[0], answer)]

    def _hear(self, session: Session, answer: m.Answer) -> list[Action]:
        """Say what a client waits for on its second connection."""
        if session.lost or not answer.number or not self._listens(session):
            return []
        return [Send(session.connections[1], answer)]

    def _no(self, session: Session, message: m.Message, code: str, text: str) -> list[Action]:
        return self._say(session, m.Refused(message.number, code, text))

    def _look_up(
        self,
        session: Session,
        message: m.Message,
        call: Callable[[], Found],
        answer: Callable[[Found], m.Answer],
    ) -> list[Action]:
        """Look up at once where only the index is asked, on another thread where a tier is."""
        if not session.house.asks:
            return self._say(session, answer(call()))
        return self._work(session, message, call, answer)

    def _work(
        self,
        session: Session,
        message: m.Message,
        call: Callable[[], Found],
        answer: Callable[[Found], m.Answer],
    ) -> list[Action]:
        """Do what may take its time on another thread, then answer."""
        found: list[Found] = []

        def start(done: Callable[[], None]) -> None:
            try:
                found.append(call())
            finally:
                done()

        def then(now: float) -> list[Action]:
            refused = m.Refused(message.number, m.FAILED, "the daemon has failed to do this")
            said = answer(found[0]) if found else refused
            return [] if session.lost else self._say(session, said)

        return [Later(start, then, session.connections[0])]

    def _maybe_over(self, session: Session) -> list[Action]:
        """End a lost session that holds nothing."""
        if session.leases or session.reservations:
            return []
        return self._end(session)

    def _end(self, session: Session) -> list[Action]:
        """Give back all that a session holds: nobody uses it any more."""
        session.lost = True
        if self._by_token.pop(session.token, None) is None:
            return []
        for token, lease in session.leases.items():
            del self._owners[token]
            lease.release()
        for reservation in session.reservations.values():
            session.house.store.abort(reservation)
        session.leases, session.reservations = {}, {}
        return [Forget(session.peer.process)]


def _identity(message: m.Open) -> Mapping[str, str]:
    """Give the fields of an identity that a client names. Raises ConfigError for other ones."""
    if set(message.identity) != set(m.IDENTITY):
        raise ConfigError(f"a client names {', '.join(m.IDENTITY)} of a namespace, all of them")
    return message.identity


def _tokens(packed: bytes) -> Sequence[bytes]:
    size = m.TOKEN_BYTES
    return [packed[at : at + size] for at in range(0, len(packed) - size + 1, size)]


def _inside(rows: NDArray[np.int32], count: int) -> bool:
    return bool(len(rows)) and 0 <= int(rows.min()) and int(rows.max()) < count
