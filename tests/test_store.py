"""kvengine.store against a plain model: unseen until committed, not lost while it is held.

The machine plays every part: callers, writers that come late or die, the writer behind, fetches
from a tier that may lose or refuse, and the clock. A block's bytes name its key and its fill.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import rig
from kvengine.arena import Arena
from kvengine.compiled import Int32s
from kvengine.index import NO_SLOT
from kvengine.keys import FORMAT_VERSION, BlockKeys, Identity, Namespace
from kvengine.lease import Lease, Reservation
from kvengine.metrics import Metrics
from kvengine.policy.lru import LRU
from kvengine.store import Store
from kvengine.tiers import Held, Report, Span

PAGE = 4096
SMALL, LARGE = (  # frames of 2 and of 4 pages
    rig.layout(layers=1, kv_heads=1, head_dim=size, head_dim_v=size) for size in (16, 64)
)
SLOTS = 24  # of SMALL
PROMPTS, DEPTH = 4, 6
LEASE_S, RESERVATION_S = 10.0, 5.0
MARK_BYTES = 48


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """A tier in a dict. Reads and writes are the machine's: it decides when, and whether."""

    name, remote, away = "disk", False, False

    def __init__(self) -> None:
        self.frames: dict[bytes, bytes] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.frames.values()))

    def scan(self) -> Iterator[Held]:
        return iter(())

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        return [len(self.frames.get(key, b"")) for key in keys]

    def read(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        raise AssertionError("the store moves no bytes")

    write = read

    def drop(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.frames.pop(key, None)

    def close(self) -> None: ...

    def detach(self) -> None: ...


@dataclass(eq=False)
class Filling:
    """A reservation, and what its owner will write."""

    held: Reservation
    marks: list[bytes]


@dataclass(eq=False)
class Holding:
    """A lease or a pin of ids, with the keys and slots that it must keep."""

    ids: Int32s
    keys: list[bytes]
    slots: np.ndarray
    lease: Lease | None = None


@dataclass(eq=False)
class Fetching:
    """Slots lent to read pinned blocks into, and those whose bytes are there."""

    pinned: Holding
    ids: Int32s
    slots: np.ndarray
    spans: list[Span]
    good: list[bool] = field(default_factory=list)


def identity(of, model: str) -> Identity:
    return Identity(
        format_version=FORMAT_VERSION,
        tenant="t",
        model=model,
        revision="",
        adapter="",
        media="",
        salt="",
        kv_dtype=of.dtype,
        fidelity="exact",
        layout=of.digest(),
        positional="rope",
        pool="target",
        source="tokens",
        epoch=0,
    )


class Blocks(RuleBasedStateMachine):
    """The store, and a dict of what was committed under each key and not dropped since."""

    tiers = 1

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.metrics = Metrics()
        self.arena = Arena(SLOTS * 2 * PAGE)
        self.store = Store(self.arena, LRU(), self.metrics, self.clock, LEASE_S, RESERVATION_S)
        self.shelf = Shelf()
        for _ in range(self.tiers):
            self.store.attach(self.shelf)
        self.names: list[Namespace] = []
        self.marks: dict[bytes, set[bytes]] = {}  # key → what was ever committed under it
        self.alive: set[bytes] = set()  # keys committed, and not dropped since
        self.fillings: list[Filling] = []
        self.leases: list[Holding] = []
        self.pins: list[Holding] = []
        self.writing: list[tuple[Int32s, list[Span]]] = []
        self.fetching: list[Fetching] = []
        self.fills = 0

    @initialize(both=st.booleans())
    def open(self, both: bool) -> None:
        for number, of in enumerate((SMALL, LARGE) if both else (SMALL,)):
            self.names.append(self.store.namespace(identity(of, f"m{number}"), of, bytes(32)))

    def open_one(self) -> None:
        """One size of slots, without the machine."""
        self.names.append(self.store.namespace(identity(SMALL, "m"), SMALL, bytes(32)))

    # What the machine knows

    def keys(self, which: int, prompt: int, first: int, count: int) -> BlockKeys:
        names = self.names[which % len(self.names)]
        # Prompts share their first two blocks with the prompt before.
        hashes = [
            bytes([prompt - (depth < 2 and prompt % 2), depth]).ljust(32, b"k")
            for depth in range(DEPTH)
        ]
        return names.keys_of_hashes(hashes)[first : first + count]

    def mark_at(self, slot: int) -> bytes:
        return bytes(self.arena.view(slot, MARK_BYTES))

    def slots_of(self, ids: Int32s) -> np.ndarray:
        return self.store._index.rows[ids, 0]

    def present(self, keys: BlockKeys) -> list[bool]:
        return self.store.contains(keys).tolist()

    def listed(self, keys: BlockKeys) -> list[bytes]:
        return [keys.key(index) for index in range(len(keys))]

    def leading(self, flags: list[bool]) -> int:
        return (flags + [False]).index(False)

    # reserve → fill → commit

    TABLES = {
        "which": st.integers(0, 1),
        "prompt": st.integers(0, PROMPTS - 1),
        "first": st.integers(0, 3),
        "count": st.integers(0, DEPTH),
    }

    @rule(**TABLES)
    def reserve(self, which: int, prompt: int, first: int, count: int) -> None:
        keys = self.keys(which, prompt, first, count)
        idle = not (self.leases or self.pins or self.fillings or self.writing or self.fetching)
        idle = idle and self.store.stats()["unwritten_blocks"] == 0
        idle = idle and not self.store._reservations and not self.store._quarantine
        before = self.present(keys)
        made = self.store.reserve(keys)
        assert made.held.tolist() == before
        taken = {keys.key(index) for index in made.indices.tolist()}
        assert not taken & {
            key for key, held in zip(self.listed(keys), before, strict=True) if held
        }
        assert len(taken) == len(made.indices) == len(made.slots)
        if idle and len(self.names) == 1:
            assert len(made) == before.count(False), "room that nobody holds was not given"
        marks = []
        for index in made.indices.tolist():
            self.fills += 1
            marks.append(keys.key(index) + self.fills.to_bytes(16, "little"))
        if len(made):
            self.fillings.append(Filling(made, marks))

    def write(self, filling: Filling, torn: bool = False) -> None:
        for slot, mark in zip(filling.held.slots.tolist(), filling.marks, strict=True):
            self.arena.view(slot, MARK_BYTES)[:] = b"\xa5" * MARK_BYTES if torn else mark

    @precondition(lambda self: self.fillings)
    @rule(data=st.data(), torn=st.booleans())
    def fill(self, data: st.DataObject, torn: bool) -> None:
        """At any time until its owner has said that it is over, the deadline past or not."""
        self.write(data.draw(st.sampled_from(self.fillings)), torn)

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        filling = data.draw(st.sampled_from(self.fillings))
        self.fillings.remove(filling)
        made = filling.held
        good = np.array(data.draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made))))
        in_time = made.token in self.store._reservations
        assert in_time or made.deadline <= self.clock.now
        self.write(filling)
        count = self.store.commit(made, None if good.all() else good)
        assert count == (good.sum() if in_time else 0)
        for index, mark, whole in zip(made.indices.tolist(), filling.marks, good, strict=True):
            key = made.keys.key(index)
            if in_time and whole:
                self.marks.setdefault(key, set()).add(mark)
                self.alive.add(key)
                assert self.store.contains(made.keys)[index]
        assert self.store.commit(made) == 0, "a reservation ends once"

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        filling = data.draw(st.sampled_from(self.fillings))
        self.fillings.remove(filling)
        self.write(filling, torn=True)
        self.store.abort(filling.held)
        self.store.abort(filling.held)

    @precondition(lambda self: self.fillings)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """The owner is gone without a word: the store waits for the deadline."""
        self.fillings.remove(data.draw(st.sampled_from(self.fillings)))

    # match → use → release

    @rule(**TABLES)
    def match(self, which: int, prompt: int, first: int, count: int) -> None:
        keys = self.keys(which, prompt, first, count)
        expected = self.leading(self.present(keys))
        assert self.store.probe(keys) == expected
        lease = self.store.match(keys)
        assert lease.blocks == expected and 0 <= lease.in_memory <= expected
        away = self.slots_of(lease.ids) == NO_SLOT
        assert lease.in_memory == self.leading((~away).tolist())
        slots = self.slots_of(lease.ids)
        self.leases.append(Holding(lease.ids, self.listed(keys)[:expected], slots, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.leases))
        self.leases.remove(held)
        held.lease.release()
        held.lease.release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), first=st.integers(0, 3), count=st.integers(0, DEPTH))
    def pin(self, data: st.DataObject, first: int, count: int) -> None:
        held = data.draw(st.sampled_from(self.leases))
        live = held.lease.token in self.store._leases
        ids, slots, _ = self.store.pin(held.lease, first, count)
        chosen = held.keys[first : first + count] if live else []
        assert len(ids) == len(slots) == len(chosen)
        if len(ids):
            self.pins.append(Holding(ids, chosen, slots))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = data.draw(st.sampled_from(self.pins))
        self.pins.remove(pinned)
        self.store.unpin(pinned.ids)

    @rule(seconds=st.sampled_from([0.5, 3.0, RESERVATION_S, LEASE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    # Between memory and the tier

    @rule(blocks=st.integers(1, 4))
    def take_dirty(self, blocks: int) -> None:
        if not self.tiers:
            return
        ids, spans = self.store.take_dirty(blocks * 2 * PAGE, 0)
        assert len(ids) == len(spans)
        if len(ids):
            self.writing.append((ids, spans))

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), good=st.booleans())
    def written(self, data: st.DataObject, good: bool) -> None:
        index = data.draw(st.integers(0, len(self.writing) - 1))
        ids, spans = self.writing.pop(index)
        for span in spans if good else ():
            mark = bytes(span.frame[:MARK_BYTES])
            assert mark in self.marks[span.key], "a slot was reused while it was being written"
            self.shelf.frames.setdefault(span.key, mark)
        self.store.written(ids, good, 0)

    def written_all(self) -> None:
        while self.writing:
            ids, spans = self.writing.pop()
            for span in spans:
                self.shelf.frames.setdefault(span.key, bytes(span.frame[:MARK_BYTES]))
            self.store.written(ids, True, 0)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        pinned = data.draw(st.sampled_from(self.pins))
        away = pinned.ids[self.slots_of(pinned.ids) == NO_SLOT]
        if not len(away):
            return
        self.pins.remove(pinned)
        slots, spans = self.store.take_slots(away)
        assert len(slots) == len(spans) <= len(away)
        if len(slots):
            self.fetching.append(Fetching(pinned, away[: len(slots)], slots, spans))
        else:
            self.pins.append(pinned)

    @precondition(lambda self: self.fetching)
    @rule(data=st.data(), fails=st.booleans())
    def fetched(self, data: st.DataObject, fails: bool) -> None:
        work = data.draw(st.sampled_from(self.fetching))
        self.fetching.remove(work)
        keep = []
        for span in work.spans:
            mark = self.shelf.frames.get(span.key)
            if mark is None:
                self.store.dropped(0, [span.key])
            elif not fails:
                span.frame[:MARK_BYTES] = mark
            keep.append(mark is not None and not fails)
        self.store.fetched(work.ids, work.slots, np.array(keep))
        self.pins.append(work.pinned)

    @precondition(lambda self: self.shelf.frames)
    @rule(data=st.data())
    def tier_loses(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.shelf.frames)))
        del self.shelf.frames[key]
        self.store.dropped(0, [key])

    # Giving up

    @rule(**TABLES)
    def drop(self, which: int, prompt: int, first: int, count: int) -> None:
        keys = self.keys(which, prompt, first, count)
        held = self.present(keys)
        assert self.store.drop(keys) == sum(held)
        assert not any(self.present(keys))
        self.alive -= set(compress(self.listed(keys), held))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        pinned = data.draw(st.sampled_from(self.pins))
        ids, keys = pinned.ids[:1], pinned.keys[:1]
        same = self.store._index.find(np.frombuffer(keys[0], "<u8").reshape(1, 4))[0] == ids[0]
        before = self.metrics.get("corrupt_blocks")
        self.store.corrupt(ids, None)
        assert self.metrics.get("corrupt_blocks") == before + 1
        if same:
            self.alive -= set(keys)

    @rule(blocks=st.integers(0, SLOTS))
    def squeeze(self, blocks: int) -> None:
        before = self.arena.taken_pages
        freed = self.store.squeeze(blocks * 2 * PAGE)
        assert freed == (before - self.arena.taken_pages) * PAGE

    @rule(which=st.integers(0, 1), count=st.integers(0, SLOTS))
    def make_room(self, which: int, count: int) -> None:
        self.store.make_room(self.names[which % len(self.names)], count)

    # What always holds

    @invariant()
    def what_is_held_is_right(self) -> None:
        rows, index = self.store._index.rows, self.store._index
        for which in range(len(self.names)):
            for prompt in range(PROMPTS):
                keys = self.keys(which, prompt, 0, DEPTH)
                ids = index.find(keys.words)
                for key, number, here in zip(
                    self.listed(keys), ids.tolist(), self.present(keys), strict=True
                ):
                    assert not here or key in self.alive, "seen, but never committed or dropped"
                    if here and rows[number, 0] != NO_SLOT:
                        assert self.mark_at(int(rows[number, 0])) in self.marks[key]

    @invariant()
    def what_is_leased_stays(self) -> None:
        live = [held for held in self.leases if held.lease.token in self.store._leases]
        reading = [work.pinned for work in self.fetching]
        for held in [*live, *self.pins, *reading]:
            found = self.store._index.keys(held.ids)
            assert [row.tobytes() for row in found] == held.keys, "an id was given to another"
            slots = self.slots_of(held.ids)
            assert ((held.slots == NO_SLOT) | (held.slots == slots)).all(), "a slot was taken away"
            held.slots = slots
            for slot, key in zip(slots.tolist(), held.keys, strict=True):
                assert slot == NO_SLOT or self.mark_at(slot) in self.marks[key]
        for ids, spans in self.writing:
            for slot, span in zip(self.slots_of(ids).tolist(), spans, strict=True):
                assert self.mark_at(slot) == bytes(span.frame[:MARK_BYTES])
                assert self.mark_at(slot) in self.marks[span.key]

    @invariant()
    def books_balance(self) -> None:
        self.store.check()
        stats = self.store.stats()
        assert stats["memory_bytes"] == self.arena.taken_pages * PAGE <= self.arena.nbytes
        assert stats["leases"] == len(self.store._leases)

    def teardown(self) -> None:
        """All owners end, or die: every slot comes back."""
        if not self.names:
            return
        for filling in self.fillings[::2]:
            self.store.abort(filling.held)
        self.fillings.clear()
        gc.collect()
        for ids, _ in self.writing:
            self.store.written(ids, False, 0)
        while self.tiers and len(taken := self.store.take_dirty(1 << 20, 0)[0]):
            self.store.written(taken, True, 0)
        for work in self.fetching:
            self.store.fetched(work.ids, work.slots, np.zeros(len(work.slots), dtype=np.bool_))
        for pinned in [*self.pins, *(work.pinned for work in self.fetching)]:
            self.store.unpin(pinned.ids)
        self.clock.now += LEASE_S + RESERVATION_S
        for _ in range(2):
            self.store.match(self.keys(0, 0, 0, 0))
            gc.collect()
        stats = self.store.stats()
        assert stats["leases"] == stats["reservations"] == stats["quarantined_blocks"] == 0
        assert stats["unwritten_blocks"] == 0 and self.store.wait_clean(0)
        self.store.check()
        self.store.squeeze(0)
        assert self.arena.taken_pages == 0
        assert self.arena.available(2 * PAGE) * 2 * PAGE <= self.arena.nbytes
        self.arena.compact()
        assert self.arena.available(2 * PAGE) == SLOTS
        self.store.check()


class BlocksInMemory(Blocks):
    """The same without a tier below."""

    tiers = 0


@pytest.mark.parametrize("machine", [Blocks, BlocksInMemory])
def test_store_against_a_plain_model(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=40))


# What the machine comes upon by chance only, step by step


@pytest.fixture(params=[Blocks, BlocksInMemory])
def blocks(request: pytest.FixtureRequest) -> Iterator[Blocks]:
    made = request.param()
    made.open_one()
    yield made
    made.what_is_held_is_right()
    made.what_is_leased_stays()
    made.teardown()


@pytest.fixture
def shelved() -> Iterator[Blocks]:
    """A store with a tier below."""
    made = Blocks()
    made.open_one()
    yield made
    made.what_is_held_is_right()
    made.what_is_leased_stays()
    made.teardown()


def save(blocks: Blocks, prompt: int, count: int = DEPTH, written: bool = True) -> BlockKeys:
    """Commit a prompt's blocks; `written`: they are in the tier as well, where there is one."""
    keys = blocks.keys(0, prompt, 0, count)
    made = blocks.store.reserve(keys)
    for index, slot in zip(made.indices.tolist(), made.slots.tolist(), strict=True):
        key, mark = keys.key(index), keys.key(index) + made.fill
        blocks.arena.view(slot, MARK_BYTES)[:] = mark
        blocks.marks.setdefault(key, set()).add(mark)
        blocks.alive.add(key)
    assert blocks.store.commit(made) == len(made)
    if written and blocks.tiers:
        blocks.writing.append(blocks.store.take_dirty(1 << 20, 0))
        blocks.written_all()
    return keys


def fill_up(blocks: Blocks) -> None:
    """Save strangers until the store has given every slot that it would give."""
    for number in range(3 * SLOTS):
        keys = blocks.names[0].keys_of_hashes([bytes([number]) * 32])
        made = blocks.store.reserve(keys)
        for slot in made.slots.tolist():
            blocks.arena.view(slot, MARK_BYTES)[:] = b"\xee" * MARK_BYTES
        blocks.store.commit(made)
        if blocks.tiers and len(made):
            blocks.store.written(blocks.store.take_dirty(1 << 20, 0)[0], False, 0)


def pinned_away(blocks: Blocks) -> tuple[BlockKeys, Holding]:
    """A prompt whose blocks are in the tier only, pinned."""
    keys = save(blocks, 0)
    blocks.store.squeeze(0)
    lease = blocks.store.match(keys)
    ids, slots, _ = blocks.store.pin(lease, 0, DEPTH)
    assert (slots == NO_SLOT).all() and lease.in_memory == 0 and len(ids) == DEPTH
    lease.release()
    blocks.pins.append(Holding(ids, blocks.listed(keys), slots))
    return keys, blocks.pins[-1]


def test_a_late_writer_harms_no_one(blocks):
    """Its keys are free for others at the deadline, its slots only when it has ended."""
    blocks.reserve(0, 0, 0, DEPTH)
    (late,) = blocks.fillings
    blocks.clock.now += RESERVATION_S
    keys = save(blocks, 0)
    assert blocks.store.stats()["quarantined_blocks"] == DEPTH
    blocks.write(late, torn=True)
    assert blocks.present(keys) == [True] * DEPTH
    blocks.what_is_held_is_right()
    lease = blocks.store.match(keys)
    fill_up(blocks)
    blocks.write(late)
    assert blocks.store.commit(late.held) == 0
    assert blocks.store.stats()["quarantined_blocks"] == 0
    blocks.fillings.clear()
    blocks.what_is_held_is_right()
    lease.release()


def test_a_dead_owner_is_waited_for(blocks):
    blocks.reserve(0, 0, 0, DEPTH)
    blocks.fillings.clear()
    gc.collect()
    assert blocks.arena.taken_pages == 2 * DEPTH
    keys = blocks.keys(0, 0, 0, DEPTH)
    assert len(blocks.store.reserve(keys)) == 0
    blocks.clock.now += RESERVATION_S
    for _ in range(2):
        assert blocks.store.match(keys).blocks == 0
        gc.collect()
    assert blocks.arena.taken_pages == 0
    assert blocks.metrics.get("expired", kind="reservation") == 1


@pytest.mark.parametrize("way", ["lease", "pin after release", "pin past the deadline"])
def test_what_is_held_is_not_evicted(blocks, way):
    keys = save(blocks, 0)
    blocks.match(0, 0, 0, DEPTH)
    (held,) = blocks.leases
    if way != "lease":
        ids, slots, _ = blocks.store.pin(held.lease, 0, DEPTH)
        blocks.pins.append(Holding(ids, held.keys, slots))
        if way == "pin after release":
            held.lease.release()
        blocks.clock.now += LEASE_S
        blocks.leases.clear()
    fill_up(blocks)
    blocks.store.squeeze(0)
    blocks.what_is_leased_stays()
    assert blocks.present(keys) == [True] * DEPTH
    assert blocks.store.drop(keys) == DEPTH
    blocks.alive -= set(blocks.listed(keys))
    fill_up(blocks)
    blocks.what_is_leased_stays()
    assert blocks.present(keys) == [False] * DEPTH


def test_what_is_not_written_yet_is_not_evicted(shelved):
    keys = save(shelved, 0, written=False)
    shelved.writing.append(shelved.store.take_dirty(1 << 20, 0))
    fill_up(shelved)
    shelved.store.squeeze(0)
    shelved.what_is_leased_stays()
    assert shelved.present(keys) == [True] * DEPTH
    # Dropped meanwhile: what is written of it goes from the tier as well.
    assert shelved.store.drop(keys) == DEPTH
    shelved.alive -= set(shelved.listed(keys))
    shelved.what_is_leased_stays()
    shelved.written_all()
    assert not set(shelved.listed(keys)) & set(shelved.shelf.frames)


def test_two_fetches_of_the_same_blocks(shelved):
    """The first is kept, the slots of the second go back."""
    _, held = pinned_away(shelved)
    lent = [shelved.store.take_slots(held.ids) for _ in range(2)]
    for slots, spans in lent:
        for span in spans:
            span.frame[:MARK_BYTES] = shelved.shelf.frames[span.key]
        shelved.store.fetched(held.ids, slots, np.ones(DEPTH, dtype=np.bool_))
        shelved.what_is_leased_stays()
    assert (shelved.slots_of(held.ids) == lent[0][0]).all()
    assert shelved.arena.taken_pages == 2 * DEPTH


def test_a_fetch_of_what_is_dropped_meanwhile(shelved):
    keys, held = pinned_away(shelved)
    slots, _ = shelved.store.take_slots(held.ids)
    assert shelved.store.drop(keys) == DEPTH
    shelved.alive -= set(shelved.listed(keys))
    shelved.store.fetched(held.ids, slots, np.ones(DEPTH, dtype=np.bool_))
    assert shelved.arena.taken_pages == 0
    assert (shelved.slots_of(held.ids) == NO_SLOT).all()


def test_a_tier_that_loses_what_is_pinned_or_not(shelved):
    keys, held = pinned_away(shelved)
    first, second, *_ = shelved.listed(keys)
    shelved.store.unpin(held.ids[1:])
    shelved.pins[:] = [Holding(held.ids[:1], [first], held.slots[:1])]
    shelved.store.dropped(0, [first, second, bytes(32)])
    assert shelved.present(keys) == [False, False] + [True] * (DEPTH - 2)
    shelved.store.check()


def test_a_save_does_not_evict_its_own_prefix(blocks):
    """Room for what continues a prompt is taken from others, though its own start is older."""
    keys = save(blocks, 1, count=3)
    for number in range(SLOTS - 3):  # full, and the prompt's start the oldest
        held = blocks.names[0].keys_of_hashes([bytes([number]) * 32])
        blocks.store.commit(blocks.store.reserve(held))
        if blocks.tiers:
            blocks.store.written(blocks.store.take_dirty(1 << 20, 0)[0], False, 0)
    made = blocks.store.reserve(blocks.keys(0, 1, 0, DEPTH))
    assert made.held.tolist() == [True] * 3 + [False] * 3 and len(made) == 3
    lease = blocks.store.match(keys)
    assert (lease.blocks, lease.in_memory) == (3, 3)
    lease.release()
    blocks.store.abort(made)


def test_a_table_larger_than_the_arena(blocks):
    """Its first blocks are taken, the others refused and counted, and nothing is lost by it."""
    hashes = [number.to_bytes(32, "little") for number in range(2 * SLOTS)]
    keys = blocks.names[0].keys_of_hashes(hashes)
    made = blocks.store.reserve(keys)
    assert made.indices.tolist() == list(range(SLOTS))
    assert blocks.metrics.get("save_refused_blocks") == SLOTS
    assert blocks.store.commit(made, np.arange(SLOTS) % 2 == 0) == SLOTS // 2
    assert blocks.store.contains(keys).sum() == SLOTS // 2
    assert len(blocks.store.reserve(keys[SLOTS:])) >= SLOTS // 2


def test_a_key_named_twice(blocks):
    names = blocks.names[0]
    a, b = (bytes([mark]) * 32 for mark in b"ab")
    made = blocks.store.reserve(names.keys_of_hashes([a, b, a, a]))
    assert made.indices.tolist() == [0, 1]
    assert blocks.store.commit(made) == 2
    lease = blocks.store.match(names.keys_of_hashes([a, a, b, a]))
    assert lease.blocks == 4
    assert blocks.store.drop(names.keys_of_hashes([a, a])) == 1
    lease.release()
    if blocks.tiers:
        blocks.store.written(blocks.store.take_dirty(1 << 20, 0)[0], True, 0)
        assert len(blocks.shelf.frames) == 0
    assert blocks.arena.taken_pages == 2
