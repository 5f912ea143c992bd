"""Blocks on their way from tiers: turns and claims alone, then loads over a tier that waits."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

import kvengine
import rig
from kvengine.fetches import Fetches

OF = rig.layout()
BLOCKS = 6
SOURCE = rig.caches(OF, BLOCKS, 1)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def fetches(now) -> Fetches:
    return Fetches(100, lambda: now[0])


def begin(fetches: Fetches, said: list, name: str, nbytes: int, deadline: float = 10.0) -> None:
    fetches.begin(nbytes, deadline, lambda in_time: said.append((name, in_time)))


def test_turns_are_taken_in_order_within_the_share(fetches):
    said: list = []
    begin(fetches, said, "a", 60)
    begin(fetches, said, "b", 60)
    begin(fetches, said, "c", 10)  # it would fit, but b was first
    assert said == [("a", True)]
    fetches.end(60)
    assert said == [("a", True), ("b", True), ("c", True)]
    begin(fetches, said, "d", 31)
    fetches.end(10)
    assert said[3:] == [("d", True)]
    fetches.end(60)
    fetches.end(31)


def test_one_is_let_in_whatever_its_size(fetches):
    said: list = []
    begin(fetches, said, "huge", 1000)
    begin(fetches, said, "small", 1)
    assert said == [("huge", True)]
    fetches.end(1000)
    assert said == [("huge", True), ("small", True)]


def test_a_turn_that_comes_too_late(fetches, now):
    said: list = []
    begin(fetches, said, "a", 100)
    begin(fetches, said, "b", 50, 1.0)
    begin(fetches, said, "c", 50, 9.0)
    now[0] = 2.0
    fetches.ring()
    assert said == [("a", True), ("b", False)]
    fetches.end(100)
    assert said == [("a", True), ("b", False), ("c", True)]


def test_a_block_is_claimed_once(fetches):
    said: list = []
    assert fetches.claim(ids(1, 2, 2)).tolist() == [True, True, False]
    assert fetches.claim(ids(2, 3)).tolist() == [False, True]
    fetches.join(ids(1, 3), lambda: said.append("both"))
    fetches.join(ids(4), lambda: said.append("nobody fetches it"))
    fetches.free(ids(1))
    assert said == ["nobody fetches it"]
    fetches.free(ids(3))
    assert said == ["nobody fetches it", "both"]
    assert fetches.claim(ids(1, 2)).tolist() == [True, False]


def test_alarms_ring_in_order_unless_cancelled(fetches, now):
    said: list = []
    fetches._thread = threading.current_thread()  # the test rings
    for when in (3.0, 1.0, 2.0):
        made = fetches.alarm(when, lambda when=when: said.append(when))
    made.cancel()
    now[0] = 2.5
    assert fetches.ring() == 3.0 and said == [1.0]
    now[0] = 3.0
    assert fetches.ring() is None and said == [1.0, 3.0]


def test_alarms_ring_by_themselves():
    rang = threading.Event()
    fetches = Fetches(100, lambda: 5.0)
    fetches.alarm(9.0, lambda: None)
    fetches.alarm(5.0, rang.set)
    assert rang.wait(rig.WAIT_S)
    fetches.close()


# Loads


class HeldUp:
    """A tier in a dict whose reads wait until the test lets them go."""

    name, remote, away, nbytes = "held", False, False, 0

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.reads: list = []
        self.waiting = False

    def scan(self):
        return iter(())

    def read(self, spans, deadline, report):
        for index, span in enumerate(spans):
            self.reads.append((span, index, report))
        if not self.waiting:
            self.let_go()

    def let_go(self, count: int = 1 << 30, good: bool = True) -> None:
        taken, self.reads = self.reads[:count], self.reads[count:]
        for span, index, report in taken:
            data = self.held[span.key]
            if good:
                span.frame[: len(data)] = data
            report(index, good)

    def write(self, spans: Sequence, deadline: float, report) -> None:
        for index, span in enumerate(spans):
            self.held[span.key] = bytes(span.frame[: span.nbytes])
            report(index, True)

    def drop(self, keys):
        pass

    def close(self):
        self.let_go(good=False)

    def detach(self):
        pass


@pytest.fixture
def tier() -> HeldUp:
    return HeldUp()


@pytest.fixture
def engine(monkeypatch, tier):
    """One prompt in the tier, nothing in memory; reads wait."""

    def open_tiers(engine):
        engine._tiers.append(tier)

    monkeypatch.setattr(kvengine.Engine, "_open_tiers", open_tiers)
    with kvengine.open("mem://?size=4M") as engine:
        keys = keys_of(engine)
        assert rig.save(engine, keys, SOURCE).good.all()
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        tier.waiting = True
        yield engine


def keys_of(engine):
    return rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))


def begin_load(engine, count: int = BLOCKS, **how):
    target = rig.caches(OF, BLOCKS)
    with engine.match(keys_of(engine)) as lease:
        assert lease.blocks == BLOCKS
        transfer = engine.load(lease, target, np.arange(count), **how)
    return transfer, target


def is_right(target, blocks: Sequence[int]) -> bool:
    slots = rig.slots_of(OF, list(blocks))
    return rig.same(OF, target, slots, SOURCE, slots) and rig.untouched(OF, target, slots)


def test_two_loads_of_a_prompt_read_it_once(engine, tier):
    one, first = begin_load(engine)
    two, second = begin_load(engine)
    assert len(tier.reads) == BLOCKS
    assert not one.wait(0.05) and not two.done()
    tier.let_go()
    assert one.wait(rig.WAIT_S) and two.wait(rig.WAIT_S)
    assert one.good.all() and two.good.all()
    assert is_right(first, range(BLOCKS)) and is_right(second, range(BLOCKS))
    assert engine.stats()["fetched_blocks"] == BLOCKS and not tier.reads
    engine.check()


def test_who_joins_a_read_that_fails_misses_as_well(engine, tier):
    one, first = begin_load(engine)
    two, second = begin_load(engine)
    tier.let_go(2)
    tier.let_go(good=False)
    assert one.wait(rig.WAIT_S) and two.wait(rig.WAIT_S)
    assert one.blocks == two.blocks == 2
    assert is_right(first, range(2)) and is_right(second, range(2))
    engine.check()


def test_at_its_deadline_a_load_has_what_arrived(engine, tier):
    """The slots of the rest stay the tier's until it has reported; then they are the blocks'."""
    transfer, target = begin_load(engine, timeout_s=0.2)
    tier.let_go(3)
    assert transfer.wait(rig.WAIT_S)
    assert transfer.good.tolist() == [True] * 3 + [False] * 3
    assert is_right(target, range(3))
    assert engine._store._lent_pages > 0
    late = tier.reads
    tier.let_go()
    assert len(late) == 3 and engine._store._lent_pages == 0
    assert is_right(target, range(3))
    tier.waiting = False
    assert rig.check_right(engine, keys_of(engine), SOURCE).all()
    assert engine.stats()["fetched_blocks"] == BLOCKS  # each was read once
    engine.check()


def test_a_deadline_for_who_has_joined(engine, tier):
    one, first = begin_load(engine)
    two, second = begin_load(engine, timeout_s=0.1)
    assert two.wait(rig.WAIT_S) and not two.good.any() and not one.done()
    assert is_right(second, [])
    tier.let_go()
    assert one.wait(rig.WAIT_S) and one.good.all() and is_right(first, range(BLOCKS))
    assert is_right(second, [])
    engine.check()


def test_nothing_arrives_in_time(engine, tier):
    transfer, target = begin_load(engine, timeout_s=0.05)
    assert transfer.wait(rig.WAIT_S) and not transfer.good.any() and is_right(target, [])
    tier.let_go(good=False)
    engine.check()


def test_what_follows_in_the_prefix_is_read_ahead(engine, tier):
    one, _ = begin_load(engine, 2)
    assert len(tier.reads) == BLOCKS
    tier.let_go()
    assert one.wait(rig.WAIT_S) and one.good.all()
    with engine.match(keys_of(engine)) as lease:
        assert lease.in_memory == BLOCKS
    engine.check()


def test_prefetch_by_name_and_a_load_that_joins_it(engine, tier):
    with engine.match(keys_of(engine)) as lease:
        assert engine.prefetch(lease, 1) == BLOCKS - 1
        assert engine.prefetch(lease, 1) == 0
        assert engine.prefetch(lease, BLOCKS) == 0
    transfer, target = begin_load(engine)
    assert len(tier.reads) == BLOCKS
    tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all() and is_right(target, range(BLOCKS))
    engine.check()


def test_a_table_may_name_a_block_twice(engine, tier):
    keys = keys_of(engine)
    twice = keys.namespace.keys_of(keys.data[:32] * 2)
    target = rig.caches(OF, 2)
    with engine.match(twice) as lease:
        transfer = engine.load(lease, target, [0, 1])
    tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all()
    engine.check()


def test_loads_wait_for_their_share_of_memory(engine, tier, monkeypatch):
    """One block at a time is lent: the others wait, and all come."""
    monkeypatch.setattr(engine._fetches, "_share_bytes", 1)
    monkeypatch.setattr("kvengine.load.FETCH_BYTES", 1)
    transfer, target = begin_load(engine)
    for _ in range(BLOCKS):
        assert rig.poll(lambda: len(tier.reads) == 1)
        tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all() and is_right(target, range(BLOCKS))
    engine.check()
