"""A tenant's engine for tests of the service: a store in virtual time, without threads or tiers."""

import random
from dataclasses import asdict

import numpy as np

import rig
from kvengine.arena import Arena
from kvengine.codec import forms_of
from kvengine.config import Config
from kvengine.keys import FORMAT_VERSION, Identity
from kvengine.metrics import Metrics
from kvengine.peer import messages as m
from kvengine.peer.service import Action, Admitted, End, Forget, Later, Peer, Send, Service
from kvengine.policy.lru import LRU
from kvengine.shares import Limits
from kvengine.slab import PAGE_BYTES
from kvengine.store import Store

SECRET = bytes(32)


class House:
    """See kvengine.peer.service.House. `now` is the time; `slots` how many blocks fit."""

    asks = False

    def __init__(self, slots: int = 8, tenant: str = "default", lease_s: float = 60.0) -> None:
        self.now = 0.0
        self.tenant = tenant
        self.config = Config(lease_s=lease_s, reservation_s=60.0)
        pages = slots * 5  # a block of rig.layout has a header of a page, and four of payload
        words = np.zeros(pages, dtype=np.uint32)
        arena = Arena(pages * PAGE_BYTES, generations=words)
        clock = lambda: self.now  # noqa: E731
        self.store = Store(arena, LRU(), Metrics(), clock, float("inf"), 60.0)
        self.current = 0

    def is_current(self, namespace) -> bool:
        return namespace.identity.epoch == self.current

    def space(self, identity, layout, smaller, ttl_s):
        forms = forms_of(identity["fidelity"], layout, smaller=smaller)
        facts = dict(identity) | {"fidelity": forms.usual.fidelity}
        made = Identity(
            format_version=FORMAT_VERSION,
            tenant=self.tenant,
            layout=layout.digest(),
            epoch=self.current,
            **facts,
        )
        space = self.store.namespace(made, layout, SECRET, forms)
        return space, [form.number for form in self.store.forms(space)]

    def probe(self, keys):
        return self.store.probe(keys)

    def contains(self, keys):
        return self.store.contains(keys)

    def match(self, keys, *, split=False, request=None):
        return self.store.match(keys, None, request)

    def committed(self, keys, count):
        self.store.make_room(keys.namespace, len(keys))

    def fetch(self, ids, timeout_s, ready):
        ready()

    def ahead(self, ids):
        pass

    def drop(self, keys):
        return self.store.drop(keys)

    def drop_all(self):
        self.current += 1
        return self.current

    def stats(self):
        return self.store.stats()


class Wire:
    """A service and its clients, without sockets: what is sent comes back as values."""

    def __init__(self, *houses: House, seed: int = 0) -> None:
        self.houses = {house.tenant: house for house in houses}
        self.random = random.Random(seed)
        self.service = Service(self._admit, self.random.randbytes)
        self.heard: dict[int, list[m.Answer]] = {}
        self.ended: set[int] = set()
        self.forgotten: set[int] = set()
        self.now = 0.0

    def _admit(self, peer: Peer, tenant: str, key: bytes) -> Admitted | str:
        house = self.houses.get(tenant or "default")
        return "no such tenant" if house is None else Admitted(house, True, Limits())

    def at(self, now: float) -> None:
        """Let time pass, and deadlines come."""
        self.now = now
        for house in self.houses.values():
            house.now = now
        self.act(self.service.tick(now))

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.heard.setdefault(action.connection, []).append(action.message)
                case Later():
                    done = []
                    action.start(lambda done=done: done.append(True))
                    assert len(done) == 1
                    self.act(action.then(self.now))
                case End():
                    if action.connection not in self.ended:
                        self.ended.add(action.connection)
                        self.act(self.service.closed(action.connection, self.now))
                case Forget():
                    self.forgotten.add(action.process)

    def connect(self, connection: int, pid: int) -> None:
        self.act(self.service.connected(connection, Peer(connection, pid, 1000, 1000)))

    def say(self, connection: int, message: m.Message) -> m.Answer | None:
        """Say something as a client; return what is answered there."""
        before = len(self.heard.setdefault(connection, []))
        self.act(self.service.received(connection, message, self.now))
        found = self.heard[connection][before:]
        assert len(found) <= 1
        return found[0] if found else None

    def close(self, connection: int) -> None:
        self.ended.add(connection)
        self.act(self.service.closed(connection, self.now))

    def exit(self, process: int) -> None:
        self.act(self.service.exited(process, self.now))


class Guest:
    """One client of a Wire: a session, and one namespace."""

    def __init__(self, wire: Wire, number: int, tenant: str = "default", model: str = "m") -> None:
        self.wire, self.pid = wire, number
        self.line, self.ear = 10 * number, 10 * number + 1
        wire.connect(self.line, self.pid)
        self.welcome = wire.say(self.line, self.hello(tenant))
        wire.connect(self.ear, self.pid)
        assert wire.say(self.ear, m.Listen(1, self.welcome.session)) == m.Done(1)
        facts = dict.fromkeys(m.IDENTITY, "") | {"model": model, "fidelity": "exact"}
        self.opened = self.say(m.Open(1, facts, asdict(rig.layout()), False))
        self.space = self.opened.numbers[0]

    def hello(self, tenant: str) -> m.Hello:
        return m.Hello(1, m.VERSION, m.VERSION, tenant, b"", True)

    def say(self, message: m.Message) -> m.Answer | None:
        return self.wire.say(self.line, message)

    def reserve(self, keys: bytes) -> m.Reserved:
        return self.say(m.Reserve(1, self.space, keys, 0, bytes(32)))

    def commit(self, made: m.Reserved) -> int:
        return self.say(m.Commit(1, made.token, bytes([1]) * (len(made.slots) // 4))).count

    def save(self, keys: bytes) -> int:
        return self.commit(self.reserve(keys))

    def match(self, keys: bytes) -> m.Leased:
        return self.say(m.Match(1, self.space, keys, 0, bytes(32)))

    def probe(self, keys: bytes) -> int:
        return self.say(m.Probe(1, self.space, keys, 0, bytes(32))).count

    def stats(self) -> dict[str, int]:
        return self.say(m.Stats(1)).counts


def keys(count: int, seed: int = 0) -> bytes:
    """Packed keys of one prompt."""
    return random.Random(seed).randbytes(32 * count)
