"""Blocks filled by several ranks: seen only when all parts of one fill are there, never lost.

Two machines: `Fills` alone against sets, and the store with the bytes of every part.
"""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import rig
from kvengine.arena import Arena
from kvengine.fills import Fills
from kvengine.index import NO_SLOT
from kvengine.keys import FORMAT_VERSION, BlockKeys, Identity, Namespace
from kvengine.lease import Lease, Reservation
from kvengine.metrics import Metrics
from kvengine.policy.lru import LRU
from kvengine.store import Store

PARTS, WHOLE = 4, 0b1111
IDS, DEADLINE_S = 12, 5.0
TOKENS = (b"one", b"two")
RESERVATION_S, LEASE_S = 5.0, 10.0
MARK_BYTES = 52


@dataclass(eq=False)
class Row:
    """A fill of one block, as it should be."""

    id: int
    token: bytes
    deadline: float
    claimed: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)
    writers: int = 0
    void: bool = False


class Model(RuleBasedStateMachine):
    """`Fills`, and rows with sets of parts. A key is an id's number and how often it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0
        self.fills = Fills(lambda ids: [bytes([id]) for id in ids.tolist()], self.draw)
        self.now = 0.0
        self.rows: dict[int, Row] = {}
        self.words: list[tuple[list[Row], set[int]]] = []
        self.given_up: set[tuple[bytes, int]] = set()

    def draw(self, count: int) -> bytes:
        self.drawn += 1
        return self.drawn.to_bytes(count, "little")

    @rule(
        token=st.sampled_from(TOKENS),
        parts=st.sets(st.integers(0, PARTS - 1), min_size=1),
        first=st.integers(0, IDS - 1),
        count=st.integers(1, 5),
        twice=st.booleans(),
    )
    def ask(self, token: bytes, parts: set[int], first: int, count: int, twice: bool) -> None:
        """As the store does it: what nobody fills is opened, the rest joined where that goes."""
        ids = [id % IDS for id in range(first, first + count)] * (1 + twice)
        bits = sum(1 << part for part in parts)
        known = self.fills.given_up(token)
        assert set(known) <= {bytes([id]) for one, id in self.given_up if one == token}
        new = [id for id in dict.fromkeys(ids) if id not in self.rows and bytes([id]) not in known]
        deadline = self.now + DEADLINE_S
        self.fills.open(token, np.array(new, np.int32), WHOLE, bits, deadline)
        joined = self.fills.join(token, np.array(ids, np.int32), bits)
        mine = []
        for id in new:
            mine.append(Row(id, token, deadline, set(parts), set(), 1))
            self.rows[id] = mine[-1]
        for at, id in enumerate(ids):
            row = self.rows.get(id)
            may = row is not None and row not in mine and not row.void and row.token == token
            may = may and not row.claimed & parts
            assert bool(joined[at]) == may, (id, row)
            if may:
                row.claimed |= parts
                row.writers += 1
                mine.append(row)
        if mine:
            self.words.append((mine, parts))

    @precondition(lambda self: self.words)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        mine, parts = self.words.pop(data.draw(st.integers(0, len(self.words) - 1)))
        good = data.draw(
            st.lists(st.sampled_from([True, True, False]), min_size=len(mine), max_size=len(mine))
        )
        bits = sum(1 << part for part in parts)
        ids = np.array([row.id for row in mine], np.int32)
        found = self.fills.settle(ids, bits, np.array(good))
        void, over = set(), set()
        for row, fine, whole in zip(mine, good, found.whole.tolist(), strict=True):
            row.writers -= 1
            if fine and not row.void:
                row.done |= parts
            elif not row.void:
                row.void = True
                void.add(row.id)
                self.given_up.add((row.token, row.id))
            assert whole == (not row.void and len(row.done) == PARTS)
            if row.void and not row.writers:
                over.add(row.id)
            if whole or row.id in over:
                del self.rows[row.id]
        assert set(found.void.tolist()) == void and set(found.over.tolist()) == over

    @precondition(lambda self: self.words)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A rank is lost, and may still write: it has not said how it went."""
        mine, _ = self.words[data.draw(st.integers(0, len(self.words) - 1))]
        found = self.fills.give_up(np.array([row.id for row in mine], np.int32))
        assert set(found.void.tolist()) == {row.id for row in mine if not row.void}
        assert not found.whole.any() and not len(found.over)
        for row in mine:
            if not row.void:
                row.void = True
                self.given_up.add((row.token, row.id))

    @rule(seconds=st.sampled_from([0.5, 2.0, DEADLINE_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        found = self.fills.expire(self.now)
        late = [r for r in self.rows.values() if not r.void and r.deadline <= self.now]
        assert set(found.void.tolist()) == {row.id for row in late}
        assert set(found.over.tolist()) == {row.id for row in late if not row.writers}
        for row in late:
            row.void = True
            self.given_up.add((row.token, row.id))
            if not row.writers:
                del self.rows[row.id]

    @invariant()
    def counts(self) -> None:
        assert self.fills.filling == sum(not row.void for row in self.rows.values())
        assert self.fills.late == sum(row.void for row in self.rows.values())

    def teardown(self) -> None:
        for mine, parts in self.words:
            ids = np.array([row.id for row in mine], np.int32)
            bits = sum(1 << part for part in parts)
            self.fills.settle(ids, bits, np.zeros(len(ids), dtype=bool))
        self.fills.expire(self.now + DEADLINE_S)
        assert not self.fills.filling and not self.fills.late
        assert not self.fills._groups and not self.fills._openings, "something leaked"


def test_fills_against_sets_of_parts():
    run_state_machine_as_test(Model, settings=settings(max_examples=40, stateful_step_count=40))


OF = rig.layout(layers=2, kv_heads=2, head_dim=16, head_dim_v=16, layer_parts=2, head_parts=2)
SLOTS = 7
VIEWS = (  # two ranks by heads, two by layers, four of one part each
    *({"heads": (0, 1)}, {"heads": (1, 2)}),
    *({"layers": (0, 1)}, {"layers": (1, 2)}),
    *({"layers": (a, a + 1), "heads": (b, b + 1)} for a in (0, 1) for b in (0, 1)),
)


@dataclass(eq=False)
class Filling:
    """A rank's reservation."""

    held: Reservation
    names: Namespace


@dataclass(eq=False)
class Holding:
    """A lease, and the marks of all parts of its blocks."""

    lease: Lease
    slots: list[int]
    marks: list[list[bytes]]


class Ranks(RuleBasedStateMachine):
    """Ranks of two engines, and whole writers, on crossing tables; readers look at all parts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.metrics = Metrics()
        form_bytes = 4 * 8192
        self.arena = Arena(SLOTS * form_bytes)
        self.store = Store(
            self.arena, LRU(), self.metrics, lambda: self.now, LEASE_S, RESERVATION_S
        )
        identity = Identity(
            format_version=FORMAT_VERSION,
            tenant="t",
            model="m",
            revision="",
            adapter="",
            media="",
            salt="",
            kv_dtype=OF.dtype,
            fidelity="exact",
            layout=OF.digest(),
            positional="rope",
            pool="target",
            source="tokens",
            epoch=0,
        )
        self.names = self.store.namespace(identity, OF, bytes(32))
        self.form = self.store.forms(self.names).usual
        self.fillings: list[Filling] = []
        self.leases: list[Holding] = []

    def keys(self, names: Namespace, prompt: int, first: int, count: int) -> BlockKeys:
        hashes = [bytes([prompt if depth > 1 else 0, depth]).ljust(32, b"k") for depth in range(5)]
        return names.keys_of_hashes(hashes)[first : first + count]

    def mark(self, filling: Filling, index: int, part: int) -> bytes:
        held = filling.held
        return held.keys.key(index) + held.fill + part.to_bytes(4, "little")

    def seen(self, slot: int) -> list[bytes]:
        room = self.arena.view(slot, self.form.nbytes)
        return [bytes(room[part * self.form.step :][:MARK_BYTES]) for part in range(PARTS)]

    def which(self) -> st.SearchStrategy[int]:
        """Indices of fillings: hypothesis would keep alive what it draws itself."""
        return st.integers(0, len(self.fillings) - 1)

    def write(self, filling: Filling) -> None:
        for slot, index in zip(filling.held.slots.tolist(), filling.held.indices, strict=True):
            room = self.arena.view(slot, self.form.nbytes)
            for part in (place.number for place in filling.names.view.places):
                start = part * self.form.step
                room[start : start + MARK_BYTES] = self.mark(filling, int(index), part)

    TABLES = {
        "prompt": st.integers(0, 2),
        "first": st.integers(0, 2),
        "count": st.integers(0, 5),
    }

    @rule(view=st.sampled_from(VIEWS), token=st.sampled_from(TOKENS), **TABLES)
    def reserve(self, view: dict, token: bytes, prompt: int, first: int, count: int) -> None:
        names = self.names.part(**view)
        keys = self.keys(names, prompt, first, count)
        before = self.store.contains(keys).tolist()
        made = self.store.reserve(keys, None, token)
        assert made.held.tolist() == before
        assert not any(before[index] for index in made.indices.tolist())
        if len(made):
            self.fillings.append(Filling(made, names))

    @rule(**TABLES)
    def reserve_whole(self, prompt: int, first: int, count: int) -> None:
        made = self.store.reserve(self.keys(self.names, prompt, first, count))
        if len(made):
            self.fillings.append(Filling(made, self.names))

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        """At any time until the rank has said that it is over, its block void or not."""
        self.write(self.fillings[data.draw(self.which())])

    @precondition(lambda self: self.fillings)
    @rule(data=st.data(), all_good=st.booleans())
    def commit(self, data: st.DataObject, all_good: bool) -> None:
        filling = self.fillings.pop(data.draw(self.which()))
        self.write(filling)
        count = len(filling.held)
        good = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        self.store.commit(filling.held, None if all_good else good)
        assert self.store.commit(filling.held) == 0, "a reservation ends once"

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The rank's connection is lost, and it may still write."""
        filling = self.fillings[data.draw(self.which())]
        self.store.expire(filling.held)
        self.store.expire(filling.held)

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """The rank is gone without a word, and writes no more."""
        del self.fillings[data.draw(self.which())]

    @rule(**TABLES)
    def match(self, prompt: int, first: int, count: int) -> None:
        lease = self.store.match(self.keys(self.names, prompt, first, count))
        slots = self.store.slots(lease.ids).tolist()
        assert NO_SLOT not in slots
        marks = [self.seen(slot) for slot in slots]
        for index, parts in enumerate(marks):
            assert {mark[:32] for mark in parts} == {lease.keys.key(index)}, "another block's part"
            assert len({mark[32:48] for mark in parts}) == 1, "parts of two fills"
            assert [mark[48] for mark in parts] == list(range(PARTS))
        self.leases.append(Holding(lease, slots, marks))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leases))
        self.leases.remove(held)
        held.lease.release()

    @rule(**TABLES)
    def drop(self, prompt: int, first: int, count: int) -> None:
        self.store.drop(self.keys(self.names, prompt, first, count))

    @rule()
    def squeeze(self) -> None:
        self.store.squeeze(0)

    @rule(seconds=st.sampled_from([1.0, RESERVATION_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def leased_blocks_stay(self) -> None:
        for held in self.leases:
            if held.lease.token in self.store._leases:
                assert [self.seen(slot) for slot in held.slots] == held.marks

    @invariant()
    def books(self) -> None:
        self.store.check()

    def teardown(self) -> None:
        for held in self.leases:
            held.lease.release()
        self.leases.clear()
        self.fillings.clear()
        self.now += RESERVATION_S + LEASE_S
        self.store.reserve(self.keys(self.names, 0, 0, 0))
        self.store.reserve(self.keys(self.names, 0, 0, 0))
        stats = self.store.stats()
        assert not stats["reservations"] and not stats["quarantined_blocks"]
        self.store.check()
        self.store.squeeze(0)
        assert not self.arena.taken_pages, "slots leaked"
        assert not self.store._fills._groups, "groups leaked"


def test_ranks_never_show_a_block_that_is_not_whole():
    run_state_machine_as_test(Ranks, settings=settings(max_examples=40, stateful_step_count=40))
