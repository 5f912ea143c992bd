"""Clients and the daemon of a host in virtual time: real service, stores, and mover of memory.

A seed names a run: clients save, fill parts together, read, adopt, drop, stop, die, lose their
connections and come back; messages take their time, epochs rise, memory moves between tenants.
Slots are written and copied in steps, and an oracle beside the memory knows who may still write or
read each. `run` raises Violation for the first promise that is broken. bench/sim.py runs many.
"""

import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

import rig
from house import House
from kvengine.arena import Arena
from kvengine.config import Config
from kvengine.peer import messages as m
from kvengine.peer.service import Action, Admitted, End, Forget, Later, Peer, Send, Service
from kvengine.residents import Resident, Residents
from kvengine.shares import Limits
from kvengine.slab import PAGE_BYTES
from kvengine.tenants import Quota, Tenants

OF = rig.layout(layer_parts=2)
WHOLE = (0, 0, 0, 0)
RANKS = ((0, 1, 0, 2), (1, 2, 0, 2))  # the parts of two ranks, by layers
FACTS = dict.fromkeys(m.IDENTITY, "") | {"model": "m", "fidelity": "exact"}
RECORD_BYTES = 32  # what stands for a part's bytes: whose they are, and of which fill
POISON = bytes([0xA5]) * RECORD_BYTES
SLOT_PAGES = 6  # of a block of two parts
TENANTS = ("default", "other")
HOLD_S = 60.0  # deadlines of leases and reservations
JOBS = 60
EVENTS_MAX = 20_000


class Violation(AssertionError):
    """A promise of kvengine/peer/README.md is broken."""


@dataclass(eq=False)
class Use:
    """A process that may write (a fill) or read (a lease) a slot, as it was lent that time."""

    process: int
    slot: int
    turn: int
    writes: bool


@dataclass(eq=False)
class Flight:
    """One reservation of one key that the daemon has to honour until its deadline."""

    token: bytes
    group: bytes
    part: tuple[int, ...]
    deadline: float
    row: int  # of the reservation
    pid: int
    wire: "Wire"
    done: bool = False


@dataclass(eq=False)
class Wire:
    """A session of a client: two connections, the answers that it waits for, what it holds."""

    line: int
    ear: int
    heard: dict[int, Callable[[m.Answer], None]] = field(default_factory=dict)
    token: bytes = b""
    sent_s: float = 0.0
    heard_s: float = 0.0
    space: int = 0
    epoch: int = -1
    up: bool = False
    over: bool = False
    jobs: int = 0
    asked: "Wire | None" = None  # the session in which the daemon is asked to take it for settled
    uses: dict[int, list[Use]] = field(default_factory=dict)  # by number of the answer
    leases: dict[int, bytes] = field(default_factory=dict)  # tokens, of those that it reads


@dataclass(eq=False)
class Client:
    """A process. `until`: it is stopped as long. `old`: lost sessions that it has yet to settle."""

    pid: int
    home: "Home"
    wire: Wire
    alive: bool = True
    until: float = 0.0
    old: list[Wire] = field(default_factory=list)


class Memory(Arena):
    """An arena beside which it is known how often each slot was lent, and who uses it."""

    def __init__(self, pages: int, sim: "Sim") -> None:
        super().__init__(pages * PAGE_BYTES, generations=np.zeros(pages, dtype=np.uint32))
        self.sim = sim
        self.turns: Counter[int] = Counter()
        self.uses: dict[int, list[Use]] = {}

    def take(self, nbytes, count):
        slots = super().take(nbytes, count)
        for slot in slots.tolist():
            self.turns[slot] += 1
            for use in self.uses.get(slot, ()):
                kind = "late writer" if use.writes else "live lease"
                raise Violation(f"a slot is lent anew under a {kind}")
        if len(slots):
            self.sim.check_quota()
        return slots

    def punch(self, slot, pages):
        start = slot * PAGE_BYTES
        self.memory[start : start + pages * PAGE_BYTES] = bytes(pages * PAGE_BYTES)

    def record(self, slot: int, part: int) -> memoryview:
        start = (slot + part) * PAGE_BYTES
        return self.memory[start : start + RECORD_BYTES]

    def use(self, process: int, slot: int, writes: bool) -> Use:
        made = Use(process, slot, self.turns[slot], writes)
        self.uses.setdefault(slot, []).append(made)
        return made

    def unused(self, gone: Callable[[Use], bool]) -> None:
        for uses in self.uses.values():
            uses[:] = [use for use in uses if not gone(use)]


class Tally:
    """As much of kvengine.metrics.Metrics as a store needs, for less."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, name, amount, **labels):
        self.counts[name] += amount


class Home(House):
    """A tenant of the simulated daemon: a House whose memory is watched, and moves."""

    def __init__(self, sim: "Sim", tenant: str, slots: int) -> None:
        super().__init__(slots, tenant, HOLD_S)
        self.memory = self.store.arena = Memory(slots * SLOT_PAGES, sim)
        self.tally = self.store._metrics = Tally()

    def memory_bytes(self):
        return self.memory.taken_pages * PAGE_BYTES

    def pressed(self):
        return self.tally.counts["evicted_blocks"] + self.tally.counts["save_refused_blocks"]

    def limit(self, nbytes):
        return self.store.limit(nbytes)


class Sim:
    """One run. `plant` is called with it before anything happens, to break something."""

    def __init__(self, seed: int, plant: "Callable[[Sim], None] | None" = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.counts: Counter[str] = Counter()
        self.checks_generation = True
        self.flips = self.random.random() < 0.2  # then a reader needs the digests, too
        self.slots = self.random.choice([4, 6, 8, 12])
        self.total_pages = int(self.slots * 1.5) * SLOT_PAGES
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self._by_connection: dict[int, tuple[Client, Wire]] = {}
        self._flights: dict[tuple[str, bytes], list[Flight]] = {}
        self._ended_epochs = dict.fromkeys(TENANTS, 0)  # the first that is not known to have ended
        self._asked: tuple[Client, Wire, m.Message, bool] | None = None
        self._in_group = False
        self.clients: list[Client] = []
        self.homes = {name: Home(self, name, self.slots) for name in TENANTS}
        self.service = Service(self._admit, self.random.randbytes)
        if plant is not None:
            plant(self)
        self.residents = self._mover()

    def _mover(self) -> Residents:
        block = SLOT_PAGES * PAGE_BYTES
        most = self.random.choice([None, (self.slots - 1) * block])
        tenants = Tenants()
        quota = Quota(reserved_bytes=self.random.choice([0, 1, 2]) * block, maximum_bytes=most)
        tenants.add("other", quota=quota)
        residents = Residents(Config(memory_bytes=self.total_pages * PAGE_BYTES), tenants)
        for name, home in self.homes.items():
            home.memory.limit(0)
            residents._by_name[name] = Resident(home, None, Quota(), tenants.secret(name))
        residents.balance()
        return residents

    def _admit(self, peer: Peer, tenant: str, key: bytes) -> Admitted:
        return Admitted(self.homes[tenant], True, Limits())

    # Time

    def after(self, delay: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), call))

    def at_client(self, client: Client, delay: float, call: Callable[[], None]) -> None:
        """Have a process do something when it runs; never, once it is dead."""

        def run() -> None:
            if client.alive and client.until > self.now:
                self.at_client(client, client.until - self.now, call)
            elif client.alive:
                call()

        self.after(delay, run)

    def delay(self) -> float:
        """Draw how long something takes: mostly short, now and then longer than a deadline."""
        if self.random.random() < 0.02:
            return self.random.uniform(20.0, 150.0)
        return self.random.expovariate(0.5)

    def run(self) -> Counter[str]:
        """Let everything happen, and look whether all is at rest then. Returns what was done."""
        for tenant in TENANTS:
            for _ in range(self.random.choice([2, 3])):
                self._start(tenant)
        for _ in range(JOBS):
            self.after(2.0 + self.random.uniform(0.0, 500.0), self._job)
        for tick in range(20):
            self.after(5.0 + tick * 30.0, self._balance)
        while self._queue:
            self.counts["events"] += 1
            if self.counts["events"] > EVENTS_MAX:
                raise Violation("it does not come to rest")
            when, _, call = heapq.heappop(self._queue)
            self._at(when)
            call()
        self._rest()
        return self.counts

    def _at(self, when: float) -> None:
        while (tick := self.service.next_tick) <= when:
            self._step(tick)
            self._act(self.service.tick(self.now))
        self._step(when)

    def _step(self, now: float) -> None:
        self.now = max(self.now, now)
        for home in self.homes.values():
            home.now = self.now

    # The daemon, and what the oracle sees of it

    def _arrive(self, client: Client, wire: Wire, connection: int, message: m.Message) -> None:
        if connection not in self._by_connection:
            return
        lives = False
        if isinstance(message, m.Commit):
            good = [good == 1 for good in message.good]
            lives = self._landed(message.token, good)
        elif isinstance(message, m.Abort):
            self._landed(message.tokens, None)
        self._asked = (client, wire, message, lives)
        self._act(self.service.received(connection, message, self.now))
        self._asked = None

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._answer(action.connection, action.message)
                case Later():
                    done = []
                    action.start(lambda done=done: done.append(True))
                    assert len(done) == 1
                    self._act(action.then(self.now))
                case End():
                    self._close(action.connection)
                case Forget():
                    pass

    def _answer(self, connection: int, message: m.Answer) -> None:
        if connection not in self._by_connection:
            return
        client, wire = self._by_connection[connection]
        if self._asked is not None and message.number == self._asked[2].number:
            self._note(client, wire, self._asked[2], self._asked[3], message)
        wire.heard_s = max(self.now + self.delay() * 0.1, wire.heard_s)

        def hear() -> None:
            then = wire.heard.pop(message.number, None)
            if then is not None:
                then(message)

        self.at_client(client, wire.heard_s - self.now, hear)

    def _close(self, connection: int) -> None:
        """The daemon closes a connection, or sees that it is closed; so the client does, later."""
        known = self._by_connection.pop(connection, None)
        if known is None:
            return
        client, wire = known
        self._voided(lambda flight: flight.wire is wire and not flight.done)
        self._act(self.service.closed(connection, self.now))
        self.at_client(client, self.delay(), lambda: self._lose(client, wire))

    def _note(
        self, client: Client, wire: Wire, asked: m.Message, lives: bool, said: m.Answer
    ) -> None:
        """Look at an answer in the moment when the daemon gives it."""
        home, memory = client.home, client.home.memory
        token, slots, writes = b"", b"", False
        match said:
            case m.Reserved():
                token, slots, writes = said.token, said.slots, True
                self._reserved(home.tenant, client.pid, wire, asked, said)
            case m.Leased() | m.Adopted():
                leased = said.lease if isinstance(said, m.Adopted) else said
                token, slots = leased.token, leased.slots
                if slots and isinstance(asked, m.Match):
                    self._is_now(home.tenant, wire)
            case m.Count() if isinstance(asked, m.Commit):
                most = sum(asked.good) * lives
                if said.count > most or (said.count < most and not self._in_group):
                    raise Violation("a commit of what was not reserved by its token")
                self.counts["committed"] += said.count
            case m.Count() if isinstance(asked, m.DropAll):
                self._ended_epochs[home.tenant] = said.count
            case m.Count() if isinstance(asked, m.Probe) and said.count:
                self._is_now(home.tenant, wire)
        if slots:
            self.counts["reserved" if writes else "leased"] += len(slots) // 4
            uses = [memory.use(client.pid, slot, writes) for slot in _numbers(slots)]
            wire.uses[said.number] = uses
            if not writes:
                wire.leases[said.number] = token
            if not client.alive:
                memory.unused(lambda use: use.process == client.pid)

    def _is_now(self, tenant: str, wire: Wire) -> None:
        if wire.epoch < self._ended_epochs[tenant]:
            raise Violation("blocks of an epoch that has ended are served")

    def _reserved(
        self, tenant: str, pid: int, wire: Wire, asked: m.Reserve, said: m.Reserved
    ) -> None:
        for row, index in enumerate(_numbers(said.indices)):
            at = (tenant, asked.keys[32 * index : 32 * index + 32])
            here = [each for each in self._flights.get(at, ()) if each.deadline > self.now]
            for other in here:
                if not asked.fill or other.group != asked.fill or other.part == asked.part:
                    raise Violation("two fill one block, or one part of it, at once")
            deadline = min([each.deadline for each in here], default=self.now + HOLD_S)
            made = Flight(said.token, asked.fill, asked.part, deadline, row, pid, wire)
            self._flights[at] = [*here, made]

    def _landed(self, token: bytes, good: list[bool] | None) -> bool:
        """Take in what a client says of a reservation; says whether it lived."""
        mine = [
            (at, each)
            for at, flights in self._flights.items()
            for each in flights
            # What ranks fill ends when someone asks after its deadline, not before.
            if each.token == token and (each.group or each.deadline > self.now)
        ]
        for at, flight in mine:
            flight.done = good is not None and flight.row < len(good) and good[flight.row]
            flights = self._flights.get(at, [])
            if not flight.group or not flight.done:
                self._flights.pop(at, None)  # a fill of ranks is over for all of them
            elif len(flights) == len(RANKS) and all(each.done for each in flights):
                del self._flights[at]
        self._in_group = any(flight.group for _, flight in mine)
        return bool(mine)

    def _voided(self, which: Callable[[Flight], bool]) -> None:
        """Fills end early with those who had a part in them."""
        for at in [at for at, flights in self._flights.items() if any(map(which, flights))]:
            del self._flights[at]

    def check_quota(self) -> None:
        """Of all memory, and of each tenant's, at most a block more than may be is taken."""
        taken = [home.memory.taken_pages for home in self.homes.values()]
        if sum(taken) > self.total_pages + SLOT_PAGES:
            raise Violation("more memory is lent than there is")
        for name, home in self.homes.items():
            most = self.residents.tenants.quota(name).maximum_bytes
            if most is not None and home.memory_bytes() > most + SLOT_PAGES * PAGE_BYTES:
                raise Violation("a tenant holds more than its maximum")

    # Clients come and go

    def _start(self, tenant: str) -> None:
        client = Client(next(self._numbers), self.homes[tenant], Wire(0, 0))
        self.clients.append(client)
        self._connect(client)

    def _connect(self, client: Client) -> None:
        wire = client.wire = Wire(next(self._numbers), next(self._numbers))
        for connection in (wire.line, wire.ear):
            self._by_connection[connection] = (client, wire)
            peer = Peer(connection, client.pid, 1000, 1000)
            self._act(self.service.connected(connection, peer))

        def welcome(said: m.Answer) -> None:
            wire.token = said.session
            self._say(client, wire, m.Listen(1, wire.token), lambda _: self._open(client, wire))

        hello = m.Hello(1, m.VERSION, m.VERSION, client.home.tenant, b"", True)
        self._say(client, wire, hello, welcome)

    def _open(self, client: Client, wire: Wire) -> None:
        def opened(said: m.Answer) -> None:
            wire.space, wire.epoch, wire.up = said.numbers[0], said.epoch, True
            self._settle(client)

        self._say(client, wire, m.Open(1, FACTS, asdict(OF), False), opened)

    def _say(
        self,
        client: Client,
        wire: Wire,
        message: m.Message,
        then: Callable[[m.Answer], None] | None = None,
    ) -> None:
        """Send something; `then` is called with the answer when it comes."""
        if wire.over:
            return
        if message.number:
            message.number = next(self._numbers)
            if then is not None:
                wire.heard[message.number] = then
        connection = wire.ear if isinstance(message, m.Listen) else wire.line
        wire.sent_s = max(self.now + self.delay() * 0.1, wire.sent_s)
        # What a process has sent is read all the same when it has died meanwhile.
        self.after(wire.sent_s - self.now, lambda: self._arrive(client, wire, connection, message))

    def _lose(self, client: Client, wire: Wire) -> None:
        """A process sees that its session is lost, and begins another."""
        if wire.over:
            return
        wire.over, wire.up = True, False
        wire.heard.clear()
        if not wire.jobs:
            self._finished(client, wire)
        client.old.append(wire)
        self._connect(client)

    def _settle(self, client: Client) -> None:
        """Say of earlier sessions that nothing of them is in use, once it is so."""
        for old in list(client.old):
            if not client.wire.up or old.jobs or old.asked is client.wire:
                continue
            old.asked = client.wire
            self._finished(client, old)
            if old.token:
                message = m.Settled(1, old.token)
                self._say(client, client.wire, message, lambda _, old=old: client.old.remove(old))
            else:
                client.old.remove(old)

    def _finished(self, client: Client, wire: Wire, number: int | None = None) -> None:
        """A process uses a lease or a reservation (None: any of a session) no more."""
        numbers = list(wire.uses) if number is None else [number]
        done = [use for each in numbers for use in wire.uses.pop(each, ())]
        for each in numbers:
            wire.leases.pop(each, None)
        client.home.memory.unused(lambda use: use in done)

    def _kill(self, client: Client) -> None:
        """End a process. What it has sent is read; that it is gone may be seen before that."""
        client.alive = False
        client.home.memory.unused(lambda use: use.process == client.pid)
        wires = [w for c, w in self._by_connection.values() if c is client]
        for connection in [n for n, (c, _) in self._by_connection.items() if c is client]:
            last = max(wire.sent_s for wire in wires) - self.now
            self.after(max(0.0, last) + self.delay(), lambda n=connection: self._close(n))
        self.after(self.delay() * 0.2, lambda: self._exit(client))
        self.after(self.random.uniform(1.0, 50.0), lambda: self._start(client.home.tenant))

    def _exit(self, client: Client) -> None:
        self._voided(lambda flight: flight.pid == client.pid and not flight.done)
        for session in self.service.sessions:
            if session.peer.pid == client.pid:
                self._act(self.service.exited(session.peer.process, self.now))
        if any(c is client for c, _ in self._by_connection.values()):
            self.after(1.0, lambda: self._exit(client))  # as the kernel says it again

    # What clients do

    def _balance(self) -> None:
        self.residents.balance()

    def _keys(self, client: Client, wire: Wire, family: int, count: int) -> bytes:
        name = f"{client.home.tenant} {wire.epoch} {family} "
        return b"".join(hashlib.sha256(f"{name}{at}".encode()).digest() for at in range(count))

    def _job(self) -> None:
        client = self.random.choice([each for each in self.clients if each.alive] or [None])
        if client is None:
            return
        self.at_client(client, 0.0, lambda: self._do(client))

    def _do(self, client: Client) -> None:
        wire, draw = client.wire, self.random
        family, count = draw.randrange(3), draw.randint(1, 4)
        keys = self._keys(client, wire, family, count)
        what = draw.choices(
            ["save", "ranks", "read", "adopt", "probe", "drop", "bump", "kill", "break", "stop"],
            [24, 14, 38, 5, 3, 2, 2, 5, 4, 4],
        )[0]
        if not wire.up and what != "kill":
            return
        self.counts[what] += 1
        match what:
            case "save":
                self._save(client, keys)
            case "ranks":
                peers = [c for c in self.clients if c.alive and c.home is client.home]
                group = draw.randbytes(16)
                for part in draw.sample(RANKS, 2):
                    peer = draw.choice(peers)
                    mine = self._keys(peer, peer.wire, family, draw.randint(1, 4))
                    rows = [mine[at : at + 32] for at in range(0, len(mine), 32)]
                    if draw.random() < 0.3:
                        draw.shuffle(rows)
                    mine = b"".join(rows)
                    self.at_client(
                        peer,
                        self.delay(),
                        lambda peer=peer, mine=mine, part=part: self._save(peer, mine, group, part),
                    )
            case "read" | "adopt":
                self._read(client, keys, what == "adopt")
            case "probe":
                self._say(client, wire, m.Probe(1, wire.space, keys, 0, bytes(32)), lambda _: None)
            case "drop":
                self._say(client, wire, m.Drop(1, wire.space, keys, 0, bytes(32)), lambda _: None)
            case "bump":
                self._say(client, wire, m.DropAll(1), lambda _: None)
            case "kill":
                if wire.up and draw.random() < 0.5:
                    self._save(client, keys)  # its last word
                self._kill(client)
            case "break":
                self._close(draw.choice([wire.line, wire.ear]))
            case "stop":
                client.until = self.now + draw.choice([1.0, 30.0, 90.0, 200.0])
        if self.flips and draw.random() < 0.3:
            slot = draw.randrange(self.slots) * SLOT_PAGES
            client.home.memory.record(slot, draw.randrange(2))[:] = POISON

    def _refused(self, client: Client, wire: Wire, said: m.Answer) -> bool:
        if not isinstance(said, m.Refused):
            return False
        if said.code == m.STALE and not wire.over:
            self._open(client, wire)
        return True

    def _save(
        self, client: Client, keys: bytes, group: bytes = b"", part: tuple[int, ...] = WHOLE
    ) -> None:
        wire = client.wire
        if not wire.up:
            return

        def reserved(said: m.Answer) -> None:
            if self._refused(client, wire, said) or not said.slots:
                return
            wire.jobs += 1
            parts = [RANKS.index(part)] if group else [0, 1]
            rows = [keys[32 * index : 32 * index + 32] for index in _numbers(said.indices)]
            fill(said, rows, parts)

        def fill(said: m.Reserved, rows: list[bytes], parts: list[int]) -> None:
            if not parts:
                self.at_client(client, self.delay(), lambda: end(said))
                return

            def write() -> None:
                for use, key in zip(wire.uses[said.number], rows, strict=True):
                    memory = client.home.memory
                    if memory.turns[use.slot] != use.turn:
                        raise Violation("a late write hits a slot that is another's")
                    stamp = (group or said.token)[:16]
                    memory.record(use.slot, parts[0])[:] = key[:16] + stamp
                fill(said, rows, parts[1:])

            self.at_client(client, self.delay(), write)

        def end(said: m.Reserved) -> None:
            self._finished(client, wire, said.number)
            wire.jobs -= 1
            count = len(said.slots) // 4
            if self.random.random() < 0.06:
                self._say(client, wire, m.Abort(0, said.token))
            else:
                bad = self.random.random() < 0.06
                good = bytes(0 if bad and row == count - 1 else 1 for row in range(count))
                self._say(client, wire, m.Commit(1, said.token, good), lambda _: None)
            self._settle(client)

        message = m.Reserve(1, wire.space, keys, 0, bytes(32), group, part)
        self._say(client, wire, message, reserved)

    def _read(self, client: Client, keys: bytes, adopts: bool) -> None:
        wire = client.wire
        if not wire.up:
            return

        def leased(said: m.Answer) -> None:
            if self._refused(client, wire, said):
                return
            lease = said.lease if isinstance(said, m.Adopted) else said
            if not lease.slots:
                return
            careless = self.random.random() < 0.2  # lets go before its device has read
            wire.jobs += 1
            uses = list(wire.uses[lease.number])
            if careless:
                release(lease)
            copied = [[POISON, POISON] for _ in uses]
            copy(lease, uses, copied, [0, 1], careless)

        def copy(lease, uses, copied, parts, careless) -> None:
            if not parts:
                self.at_client(client, self.delay(), lambda: check(lease, uses, copied, careless))
                return

            def read() -> None:
                for use, into in zip(uses, copied, strict=True):
                    into[parts[0]] = bytes(client.home.memory.record(use.slot, parts[0]))
                copy(lease, uses, copied, parts[1:], careless)

            self.at_client(client, self.delay(), read)

        def check(lease, uses, copied, careless) -> None:
            memory = client.home.memory
            slots = np.frombuffer(lease.slots, "<i4")
            same = memory.generation(slots) == np.frombuffer(lease.generations, "<u4")
            bad = []
            for row, (use, records) in enumerate(zip(uses, copied, strict=True)):
                key = keys[32 * row : 32 * row + 16]
                right = all(each[:16] == key for each in records)
                right &= records[0][16:] == records[1][16:]
                if self.checks_generation and not same[row]:
                    continue
                if self.flips and not right:
                    bad.append(row)
                    continue
                if not right:
                    raise Violation("wrong bytes are taken for good")
                if memory.turns[use.slot] != use.turn:
                    raise Violation("a slot that was lent anew is taken for good")
                self.counts["verified"] += 1
            if bad and not careless:
                self.counts["corrupt"] += len(bad)
                rows = np.array(bad, dtype="<i4").tobytes()
                self._say(client, wire, m.Corrupt(0, lease.token, rows))
            if not careless:
                release(lease)
            wire.jobs -= 1
            self._settle(client)

        def release(lease) -> None:
            self._finished(client, wire, lease.number)
            self._say(client, wire, m.Release(0, lease.token))

        message = m.Match(1, wire.space, keys, 0, bytes(32))
        others = [
            token
            for other in self.clients
            if other.home is client.home and other is not client and other.wire.up
            for token in other.wire.leases.values()
        ]
        if adopts and others:
            message = m.Adopt(1, self.random.choice(others))

            def adopted(said: m.Answer) -> None:
                nonlocal keys
                if isinstance(said, m.Adopted):
                    keys = said.keys
                    leased(said)

            self._say(client, wire, message, adopted)
        else:
            self._say(client, wire, message, leased)

    # At rest

    def _rest(self) -> None:
        """Nobody does anything any more: nothing is held, nothing is lost."""
        self._at(self.now + 2 * HOLD_S)
        while self._queue:
            when, _, call = heapq.heappop(self._queue)
            self._at(when)
            call()
        for client in self.clients:
            if client.alive and (client.wire.heard or client.old or not client.wire.up):
                raise Violation("a client waits for ever")
        held = [s for s in self.service.sessions if s.lost or s.leases or s.reservations]
        if held:
            raise Violation("a session holds something for ever")
        for home in self.homes.values():
            self._sweep(home)
            stats = home.store.stats()
            for name in ("leases", "reservations", "quarantined_blocks"):
                if stats[name]:
                    raise Violation(f"{name} are left for ever: {stats[name]}")
            try:
                home.store.check()
            except AssertionError as error:
                raise Violation(f"the books do not balance: {error}") from error
            if stats["memory_blocks"] * SLOT_PAGES != home.memory.taken_pages:
                raise Violation("slots are lost")
        for client in self.clients:
            for session in self.service.sessions:
                if session.peer.pid == client.pid:
                    self._act(self.service.exited(session.peer.process, self.now))
        if self.service.sessions:
            raise Violation("sessions are left of processes that are gone")
        for home in self.homes.values():
            home.store.squeeze(0)
            if home.memory.taken_pages:
                raise Violation("blocks that nobody holds cannot be evicted")

    def _sweep(self, home: Home) -> None:
        space, _ = home.space(FACTS, OF, False, None)
        home.store.match(space.keys([]))


def _numbers(column: bytes) -> list[int]:
    return np.frombuffer(column, "<i4").tolist()


def run(seed: int, plant: Callable[[Sim], None] | None = None) -> Counter[str]:
    """Run a seed. Raises Violation, which names it."""
    try:
        return Sim(seed, plant).run()
    except Violation as error:
        raise Violation(f"seed {seed}: {error}") from error


def first_found(plant: Callable[[Sim], None], seeds: int) -> tuple[int, str]:
    """Return the first of so many seeds that finds what is planted, and how; -1: none does."""
    for seed in range(seeds):
        try:
            run(seed, plant)
        except Violation as error:
            return seed, str(error)
    return -1, ""
