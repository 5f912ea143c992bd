"""What a client must not reach that is another's: tries of each kind, in small and in full numbers.

tests/test_isolation.py runs them in small, `python -m bench isolation` in full.
"""

import contextlib
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import kvengine
import rig
from house import Guest, House, Wire, keys
from kvengine.config import Config
from kvengine.engine import Engine
from kvengine.peer import messages as m
from kvengine.peer.service import Admitted, Peer, Send
from kvengine.residents import Residents
from kvengine.shares import Limits
from kvengine.slab import PAGE_BYTES
from kvengine.tenants import Quota, Tenants, sign
from test_daemon import Daemon, at_rest, keys_of

ONE = rig.layout()
MIB = 1 << 20


@dataclass
class Found:
    """How often something was tried, and what was wrong."""

    count: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def expect(self, right: object, note: str) -> None:
        """Count a try that is to come out right."""
        self.count += 1
        if not right:
            self.wrong += 1
            self.notes.append(note)


# Forged names. No sockets: a million tries take seconds.


class Gate(Wire):
    """A wire whose clients show credentials, as the daemon's do."""

    def __init__(self, tenants: Tenants, *houses: House) -> None:
        super().__init__(*houses)
        self._tenants = tenants

    def _admit(self, peer: Peer, tenant: str, key: bytes) -> Admitted | str:
        mode = self._tenants.admits(tenant, peer.uid, key, 1000.0)
        if not mode or tenant not in self.houses:
            return "no such tenant"
        return Admitted(self.houses[tenant], mode == "rw", Limits())


class Caller(Guest):
    """A guest that shows a credential."""

    def __init__(self, wire: Wire, number: int, tenant: str, key: bytes) -> None:
        self._key = key
        super().__init__(wire, number, tenant)

    def hello(self, tenant: str) -> m.Hello:
        return m.Hello(1, m.VERSION, m.VERSION, tenant, self._key, True)


def forged(tries: int, seed: int = 0) -> Found:
    """Have a client of one tenant name what is another's, flip bits of it, and guess."""
    draw, found = random.Random(seed), Found()
    tenants = Tenants()
    key, other = tenants.add("a"), tenants.add("b")
    front = tenants.add("front", gateway=True, serves=("b",))
    wire = Gate(tenants, House(tenant="a"), House(tenant="b"))
    service = wire.service
    one, two = Caller(wire, 1, "a", key), Caller(wire, 2, "b", other)
    beside = Caller(wire, 3, "b", other)  # another client of the forger's own tenant
    one.save(keys(3))
    leased, made = one.match(keys(3)), one.reserve(keys(4, seed=1))
    theirs = beside.reserve(keys(1, seed=2))
    before = one.stats()
    live = [leased.token, made.token, theirs.token, one.welcome.session, made.fill]
    secrets = [key, sign(front, "a", 2000.0), sign(front, "b", 999.0), sign(key, "a", 2000.0)]

    def flip(data: bytes) -> bytes:
        how = draw.randrange(4)
        if how == 0:
            return draw.randbytes(len(data))
        at = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        return bytes(flipped)

    def token(mine: int = 5) -> bytes:
        data = live[draw.randrange(mine)]
        return data if draw.random() < 0.5 else flip(data)

    def say(message: m.Message) -> m.Answer | None:
        said = service.received(two.line, message, 0.0)
        return said[0].message if said and isinstance(said[0], Send) else None

    def table() -> bytes:
        packed = keys(3)
        return packed if draw.random() < 0.5 else flip(packed[:32]) + packed[32:]

    rows = struct.pack("<2i", 0, 1)
    number = 1000
    for turn in range(tries):
        kind = turn % 12
        if kind == 0:
            said = say(m.Adopt(1, token()))
            found.expect(isinstance(said, m.Refused), "Adopt")
        elif kind == 1:
            said = say(m.Commit(1, token(), b"\1" * draw.randrange(5)))
            found.expect(said == m.Count(1, 0), "Commit")
        elif kind == 2:
            said = say(m.Fetch(1, token(), rows, 1.0))
            found.expect(said == m.Fetched(1, b"", b""), "Fetch")
        elif kind == 3:
            message = (m.Release, m.Abort)[draw.randrange(2)](0, token() + token())
            found.expect(say(message) is None, "Release or Abort")
        elif kind == 4:
            found.expect(say(m.Corrupt(0, token(), rows)) is None, "Corrupt")
        elif kind == 5:
            said = say((m.Probe, m.Drop)[draw.randrange(2)](1, two.space, table(), 0, bytes(32)))
            found.expect(said is None or said == m.Count(1, 0), "keys")
        elif kind == 6:
            said = say(m.Match(1, two.space, table(), 0, draw.randbytes(32)))
            found.expect(isinstance(said, m.Leased) and not said.slots, "Match")
        elif kind == 7:
            space = draw.randrange(2, 1 << 32)
            said = say((m.Match, m.Reserve)[draw.randrange(2)](1, space, table(), 0, bytes(32)))
            found.expect(isinstance(said, m.Refused) and said.code == m.SPACE, "namespaces")
        elif kind == 8:
            found.expect(say(m.Settled(0, token())) is None, "Settled")
        else:  # who somebody is
            number += 1
            wire.connect(number, number)
            if kind == 9:
                hello = m.Listen(1, token())
            elif kind == 10:
                credential = secrets[draw.randrange(len(secrets))]
                credential = flip(credential) if credential == key else credential
                hello = m.Hello(1, 1, 1, "a", credential, True)
            else:
                name = draw.choice(["", "A", "a ", "a\0", "c", "default", "front", "../a", "a/b"])
                credential = draw.choice([key, other, front, b"", draw.randbytes(32)])
                hello = m.Hello(1, 1, 1, name, credential, True)
            said = service.received(number, hello, 0.0)
            refused = not any(isinstance(each, Send) for each in said) or isinstance(
                said[0].message, m.Refused
            )
            found.expect(refused, f"{type(hello).__name__} {hello}")
            service.closed(number, 0.0)
    found.expect(one.stats() == before, "what the other holds has changed")
    found.expect(one.commit(made) == 4 and one.probe(keys(3)) == 3, "its tokens have ended")
    found.expect(len(service.sessions) == 3, "sessions")
    for house in wire.houses.values():
        house.store.check()
    return found


# Hit ratios under a flood


def flooded(requests: int, seed: int = 0) -> tuple[float, float]:
    """Give a tenant's hit ratio by itself, and where another floods the cache meanwhile."""
    return _ratio(requests, seed, 0), _ratio(requests, seed, 2)


def _ratio(requests: int, seed: int, flood: int) -> float:
    nbytes = 4 * MIB
    tenants = Tenants()
    tenants.add("a", quota=Quota(reserved_bytes=nbytes // 4))
    tenants.add("b")
    residents = Residents(Config(memory_bytes=nbytes, populate=False, lossless=False), tenants)
    residents.balance()
    try:
        engines = residents.engines()
        a, b = engines["a"], engines["b"]
        mine, theirs = _names(a), _names(b)
        # Its working set is within what it has reserved.
        fits = nbytes // 4 // (a.store.frame_bytes(mine.number) + PAGE_BYTES) // 4
        draw = np.random.default_rng(seed)
        hits = 0
        for turn in range(requests):
            keys = mine.keys(rig.prompt(4, ONE, int(draw.integers(fits))))
            hits += a.probe(keys)
            _hold(a, keys)
            for step in range(flood):
                _hold(b, theirs.keys(rig.prompt(4, ONE, 1_000_000 + turn * flood + step)))
            if turn % 8 == 0:
                residents.balance()
        return hits / (4 * requests)
    finally:
        residents.close()


def _names(engine: Engine) -> kvengine.Namespace:
    return rig.names(engine, ONE)


def _hold(engine: Engine, keys: kvengine.BlockKeys) -> None:
    """Have blocks whose bytes nobody writes."""
    made = engine.store.reserve(keys)
    engine.store.commit(made)
    with engine.match(keys):
        pass


# Processes that are killed, stopped and slow


@contextlib.contextmanager
def child(url: str, what: str, first: int) -> Iterator[tuple[int, int]]:
    """Fork a client that holds something; give its process and the pipe that it says so on."""
    here, there = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(here)
            _client(url, what, first, there)
        finally:
            os._exit(1)
    os.close(there)
    try:
        yield process, here
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(here)


def _client(url: str, what: str, first: int, said: int) -> None:
    engine = kvengine.open(url)
    keys = keys_of(engine, 4, first)
    if what == "reserves":
        made = engine._proxy.reserve(keys)
        assert len(made)
        os.write(said, b"!")
        time.sleep(1000)
    assert rig.save(engine, keys, rig.caches(ONE, 4, seed=first)).good.all()
    if what == "leases":
        lease = engine.match(keys)
        assert lease.blocks == 4
        os.write(said, b"!")
        time.sleep(1000)
    os.write(said, b"!")
    while True:  # saves and loads until it ends
        rig.save(engine, keys, rig.caches(ONE, 4, seed=first))
        rig.check_right(engine, keys, rig.caches(ONE, 4, seed=first))
        engine.drop(keys)


HOW = ("killed reserves", "killed leases", "killed busy", "stopped busy", "stopped reserves")


def cycles(folder: Path, count: int, seed: int = 0, daemons: int = 10) -> Found:
    """Kill, stop and continue clients, and the daemon in each `daemons`-th cycle.

    After each: whoever comes saves and loads what is right, and at the end nothing is left.
    """
    draw, found = random.Random(seed), Found()
    daemon = Daemon(folder, "mem://?size=4M&reservation_s=0.2&lease_s=0.2")
    try:
        engine = kvengine.open(daemon.url)
        fds = memory = -1
        for turn in range(count):
            how = HOW[turn % len(HOW)]
            first = 4 * draw.randrange(8)
            with child(daemon.url, how.split()[1], first) as (process, said):
                os.read(said, 1)
                if how.startswith("stopped"):
                    os.kill(process, signal.SIGSTOP)
                else:
                    time.sleep(draw.random() * 0.02)
                    os.kill(process, signal.SIGKILL)
                if turn % daemons == daemons - 1:
                    if turn // daemons % 2:
                        daemon.process.send_signal(signal.SIGSTOP)
                        time.sleep(0.05)
                        daemon.process.send_signal(signal.SIGCONT)
                    else:
                        daemon.stop(signal.SIGKILL)
                        daemon.start()
                        fds = -1
                found.expect(rig.poll(lambda: not engine.away), f"{turn} {how}: away")
                found.expect(_serves(engine, 40 + turn % 8), f"{turn} {how}: wedged or wrong")
                if how.startswith("stopped"):
                    os.kill(process, signal.SIGCONT)
            found.expect(rig.poll(lambda: at_rest(engine)), f"{turn} {how}: slots leak")
            if fds < 0:
                rig.poll(lambda: _open(daemon)[0] == _open(daemon)[0])
                time.sleep(0.1)
                fds, memory = _open(daemon)
            found.expect(
                rig.poll(lambda fds=fds, memory=memory: _open(daemon) == (fds, memory), 10.0),
                f"{turn} {how}: descriptors leak, {_open(daemon)} of {(fds, memory)}",
            )
        engine.close()
    finally:
        daemon.process.kill()
        daemon.process.communicate()
    return found


def _serves(engine: Engine, seed: int) -> bool:
    """Whether a block that is saved is held, and right: `check_right` raises where it is not."""
    keys, source = keys_of(engine, 2, 4 * seed), rig.caches(ONE, 2, seed=seed)
    rig.save(engine, keys, source)
    return bool(rig.check_right(engine, keys, source).all())


def _open(daemon: Daemon) -> tuple[int, int]:
    """How many descriptors the daemon has, and how many of them are shared memory."""
    place = f"/proc/{daemon.process.pid}/fd"
    links = []
    for fd in os.listdir(place):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"{place}/{fd}"))
    return len(links), sum("memfd:" in link for link in links)
