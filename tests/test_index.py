"""kvengine.index against plain dicts, with its loops compiled and as plain Python."""

import gc
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import loops
from kvengine import compiled
from kvengine.index import COMMITTED, DOOMED, FILLING, FREE, LEASES, NO_SLOT, ROWS_MIN, SLOT, Index
from kvengine.policy import NO_PARENT, Run
from kvengine.policy.lru import LRU

BYTES_A_BLOCK = 150  # of index and policy together
KEYS = st.lists(st.integers(0, 399), max_size=60)
# Low bits of these say where a key's probe begins: close together, and at the table's end.
HOMES = [0, 1, 2, 2 * ROWS_MIN - 1, 2 * ROWS_MIN - 2, (1 << 63) | (2 * ROWS_MIN - 1), 1 << 20]
Words = np.ndarray


@pytest.fixture(params=loops.KINDS, scope="module")
def index(request: pytest.FixtureRequest, require) -> ModuleType:
    if request.param == "native":
        require("numba")
    return loops.load("kvengine.index", request.param)


def words_of(numbers: list[int]) -> Words:
    """Keys of 32 bytes, read-only as those of a prompt: neighbours differ in one word of four."""
    rows = np.zeros((len(numbers), 4), np.uint64)
    for row, number in zip(rows, numbers, strict=True):
        group, member = divmod(number, 4)
        row[0] = HOMES[group % len(HOMES)]
        row[1:] = group
        if member:
            row[member] += np.uint64(1 << 40)
    rows.flags.writeable = False
    return rows


def random_words(count: int, seed: int) -> Words:
    return np.random.default_rng(seed).integers(0, 1 << 64, (count, 4), dtype=np.uint64)


class Table(RuleBasedStateMachine):
    """KeyTable is a dict from keys to ids."""

    def __init__(self, index: ModuleType) -> None:
        super().__init__()
        self.table = index.KeyTable()
        self.ids: dict[bytes, int] = {}
        self.waiting: set[int] = set()  # erased, not yet free
        self.seed = 0

    @initialize(count=st.sampled_from([0, 0, ROWS_MIN - 100, ROWS_MIN, 3 * ROWS_MIN]))
    def fill(self, count: int) -> None:
        self.claim_words(random_words(count, 1))

    def claim_words(self, words: Words) -> None:
        before, waiting = dict(self.ids), self.waiting
        ids, fresh = self.table.claim(words)
        assert ids.dtype == np.int32 and fresh.dtype == np.bool_
        for row, number, new in zip(words, ids.tolist(), fresh.tolist(), strict=True):
            key = row.tobytes()
            assert new == (key not in self.ids), "a key named twice is new once"
            if new:
                taken = number in self.ids.values() if len(words) < 100 else False
                assert 0 <= number < self.table.capacity and not taken and number not in waiting
                self.ids[key] = number
            assert self.ids[key] == number
        assert len(set(self.ids.values())) == len(self.ids)
        assert before.items() <= self.ids.items()

    @rule(numbers=KEYS)
    def claim(self, numbers: list[int]) -> None:
        self.claim_words(words_of(numbers))

    @rule(count=st.integers(1, 700))
    def claim_strangers(self, count: int) -> None:
        self.seed += 1
        self.claim_words(random_words(count, self.seed + 1))

    @rule(numbers=KEYS)
    def find(self, numbers: list[int]) -> None:
        words = words_of(numbers)
        expected = [self.ids.get(row.tobytes(), -1) for row in words]
        assert self.table.find(words).tolist() == expected

    @rule(numbers=KEYS, freed=st.booleans())
    def erase(self, numbers: list[int], freed: bool) -> None:
        keys = [row.tobytes() for row in words_of(sorted(set(numbers)))]
        ids = np.array([self.ids.pop(key) for key in keys if key in self.ids], np.int32)
        self.table.erase(ids)
        if freed:
            self.table.free(ids)
        else:
            self.waiting |= set(ids.tolist())

    @rule(every=st.integers(1, 9))
    def erase_many(self, every: int) -> None:
        keys = list(self.ids)[::every]
        ids = np.array([self.ids.pop(key) for key in keys], np.int32)
        self.table.erase(ids)
        self.table.free(ids)

    @rule()
    def free(self) -> None:
        self.table.free(np.array(sorted(self.waiting), np.int32))
        self.waiting = set()

    @invariant()
    def all_are_found(self) -> None:
        table, keys = self.table, list(self.ids)
        ids = np.array([self.ids[key] for key in keys], np.int32)
        words = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 4)
        assert table.count == len(keys) <= table.capacity - len(self.waiting)
        assert np.array_equal(table.find(words), ids)
        assert sorted(table.live().tolist()) == sorted(ids.tolist())
        assert table.keys(ids).tobytes() == b"".join(keys)


def test_a_key_table_is_a_dict(index):
    run_state_machine_as_test(
        lambda: Table(index), settings=settings(max_examples=100, stateful_step_count=25)
    )


def test_both_kinds_of_loops_give_the_same_ids(require):
    require("numba")
    tables = [loops.load("kvengine.index", kind).KeyTable() for kind in loops.KINDS]
    for step in range(12):
        words = np.concatenate([random_words(400, step), random_words(200, step // 2)])
        ids, fresh = zip(*(table.claim(words) for table in tables), strict=True)
        assert np.array_equal(*ids) and np.array_equal(*fresh)
        for table in tables:
            table.erase(ids[0][fresh[0]][::3])
            table.free(ids[0][fresh[0]][::3])
        assert np.array_equal(*(table.find(words) for table in tables))
    assert tables[0].nbytes == tables[1].nbytes


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tables_of_none_and_one(index, count):
    table = index.KeyTable()
    words = words_of(list(range(count)))
    assert table.find(words).tolist() == [-1] * count
    ids, fresh = table.claim(words)
    assert len(ids) == len(fresh) == count and fresh.all()
    assert table.find(words).tolist() == ids.tolist() and table.keys(ids).shape == (count, 32)
    table.erase(ids)
    table.free(ids)
    assert table.count == 0 and not len(table.live())


def test_words_need_not_be_contiguous_nor_read_only(index):
    table = index.KeyTable()
    words = random_words(90, 5)
    table.claim(words[::3])
    assert (table.find(words) >= 0).tolist() == [i % 3 == 0 for i in range(90)]
    assert (table.find(np.asfortranarray(words)) >= 0).sum() == 30


def test_a_row_keeps_its_columns_while_the_index_grows(index):
    rows = index.Index()
    ids, _ = rows.claim(random_words(3, 1))
    rows.start(ids, 7)
    assert rows.rows[ids].tolist() == [[NO_SLOT, 1, 7, FILLING]] * 3
    rows.rows[ids, SLOT] = [11, 12, 13]
    rows.set_state(ids, COMMITTED)
    before = rows.capacity
    more, _ = rows.claim(random_words(3 * ROWS_MIN, 2))
    assert rows.capacity > before and len(rows.rows) == rows.capacity
    assert rows.rows[ids].tolist() == [[11 + i, 1, 7, COMMITTED] for i in range(3)]
    assert not set(ids.tolist()) & set(more.tolist())
    new = more[more >= before]
    assert len(new) and not rows.rows[new].any(), "rows that nobody has begun are FREE and empty"
    assert rows.states(new).tolist() == [FREE] * len(new)


def test_states_and_tiers_stand_side_by_side(index):
    rows = index.Index()
    ids, _ = rows.claim(random_words(4, 1))
    rows.start(ids, 0)
    rows.set_state(ids, COMMITTED)
    rows.add_tier(ids[:2], 0)
    rows.add_tier(ids[1:3], 3)
    rows.add_tier(ids[1:3], 3)
    assert rows.tiers(ids).tolist() == [1, 9, 8, 0]
    rows.set_state(ids[1:], DOOMED)
    assert rows.states(ids).tolist() == [COMMITTED, DOOMED, DOOMED, DOOMED]
    assert rows.tiers(ids).tolist() == [1, 9, 8, 0]
    rows.remove_tier(ids, 3)
    rows.remove_tier(ids[3:], 0)
    assert rows.tiers(ids).tolist() == [1, 1, 0, 0]
    assert rows.states(ids).tolist() == [COMMITTED, DOOMED, DOOMED, DOOMED]


@settings(max_examples=50)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=12)), max_size=12)
)
def test_leases_are_counted(index, steps):
    """A table that names a block twice counts it twice."""
    rows = index.Index()
    ids, _ = rows.claim(random_words(10, 1))
    rows.start(ids, 0)
    assert rows.unlease(ids)[0].tolist() == ids.tolist(), "a reservation's own lease"
    rows.set_state(ids[::3], DOOMED)
    doomed = set(ids[::3].tolist())
    counts: Counter[int] = Counter()
    for take, table in steps:
        edges = []
        if not take:
            table = [i for at, i in enumerate(table) if table[:at].count(i) < counts[i]]
        for i in table:
            counts[i] += 1 if take else -1
            if counts[i] == (1 if take else 0):
                edges.append(int(ids[i]))
        if take:
            assert rows.lease(ids[table]).tolist() == edges
        else:
            free, gone = rows.unlease(ids[table])
            assert free.tolist() == [each for each in edges if each not in doomed]
            assert sorted(gone.tolist()) == sorted(each for each in edges if each in doomed)
        assert rows.rows[ids, LEASES].tolist() == [counts[i] for i in range(10)]


def test_bytes_a_block():
    """At every size, growth included, and without an object a block for the collector to walk."""
    size = 1_000_000 if compiled.NATIVE else 100_000
    index, policy = Index(), LRU()
    gc.collect()
    objects = len(gc.get_objects())
    for step in range(size // 8000):
        ids, _ = index.claim(random_words(8000, step))
        index.start(ids, 0)
        policy.added(Run(ids, NO_PARENT, 0, 1), 0.0)
        if index.count >= 32_000:
            nbytes = (index.nbytes + policy.nbytes) / index.count
            assert nbytes <= BYTES_A_BLOCK, f"{nbytes:.1f} bytes a block of {index.count}"
    assert index.count == size // 8000 * 8000
    assert len(gc.get_objects()) - objects < 1000


@settings(max_examples=60, deadline=None)
@given(
    held=st.lists(
        st.tuples(
            st.integers(-1, 1), st.integers(0, 3), st.sampled_from([FILLING, COMMITTED, DOOMED])
        ),
        min_size=1,
        max_size=12,
    ),
    tiers=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    asked=st.integers(1, 14),
    namespace=st.integers(0, 3),
    bits=st.integers(0, 3),
)
def test_the_prefix_is_the_leading_blocks_that_a_namespace_holds(
    index, held, tiers, asked, namespace, bits
):
    table = index.Index()
    words = words_of(list(range(0, 4 * 14, 4)))
    ids = table.claim(words[: len(held)])[0]
    expected, memory = 0, 0
    ended = out = False
    for row, (slot, number, state), tier in zip(ids.tolist(), held, tiers, strict=False):
        table.rows[row] = (slot if slot else NO_SLOT, 0, number, state | tier << 8)
        here = state == COMMITTED and number >> 1 == namespace >> 1
        in_memory = here and table.rows[row, SLOT] != NO_SLOT
        ended |= not (in_memory or (here and tier & bits))
        out |= not in_memory
        if expected < asked:
            expected += not ended
            memory += not ended and not out
    found, in_memory = table.prefix(words[:asked], namespace, bits)
    assert found.tolist() == ids[:expected].tolist()
    assert in_memory == memory
