"""Blocks on their way from tiers: turns and claims alone, then loads over a tier that waits."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

import kvengine
import rig
from kvengine.fetches import Fetches
from kvengine.load import Load, pieces

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


def test_turns_that_end_at_once_do_not_pile_up(fetches):
    said: list = []

    def refused(in_time: bool) -> None:
        said.append(in_time)
        fetches.end(100)

    begin(fetches, [], "first", 100)
    for _ in range(2000):
        fetches.begin(100, 10.0, refused)
    fetches.end(100)
    assert said == [True] * 2000
    begin(fetches, said, "next", 100)
    assert said[-1] == ("next", True)


def test_a_turn_that_fails_holds_up_no_other(fetches):
    said: list = []

    def fails(in_time: bool) -> None:
        raise RuntimeError("planted")

    begin(fetches, said, "first", 100)
    fetches.begin(10, 10.0, fails)
    begin(fetches, said, "second", 100)
    with pytest.raises(RuntimeError):
        fetches.end(100)
    fetches.end(10)
    assert said == [("first", True), ("second", True)]


def test_an_alarm_set_while_late_turns_are_told():
    rang, time = threading.Event(), [0.0]
    fetches = Fetches(100, lambda: time[0])
    begin(fetches, [], "first", 100)
    fetches.begin(100, 0.0, lambda in_time: fetches.alarm(0.0, rang.set))
    fetches.alarm(0.0, lambda: None)
    assert rang.wait(rig.WAIT_S)
    fetches.close()


def test_who_waits_is_told_at_the_end(fetches, now):
    said: list = []
    begin(fetches, said, "first", 100)
    begin(fetches, said, "second", 100)
    fetches.alarm(10.0, lambda: said.append("alarm"))
    fetches.close()
    begin(fetches, said, "third", 100)
    assert said == [("first", True), "alarm", ("second", False), ("third", False)]


def test_an_alarm_that_fails_silences_no_other():
    failed: list = []
    rang = threading.Event()
    fetches = Fetches(100, lambda: 5.0, failed.append)

    def fails() -> None:
        raise RuntimeError("planted")

    fetches.alarm(1.0, fails)
    fetches.alarm(2.0, rang.set)
    assert rang.wait(rig.WAIT_S)
    fetches.close()
    assert [str(error) for error in failed] == ["planted"]


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


# A few layers at a time


@pytest.fixture
def layered(monkeypatch) -> None:
    """Frames are cut between their two layers."""
    monkeypatch.setattr("kvengine.load.PIECE_BYTES", 8 << 10)


def same_layer(target, layer: int) -> bool:
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(target[layer], SOURCE[layer], strict=True)
    )


def test_the_first_layers_are_there_while_the_others_are_read(engine, tier, layered):
    transfer, target = begin_load(engine)
    assert [(span.start, span.stop) for span, _, _ in tier.reads] == [(0, 12 << 10)] * BLOCKS
    tier.let_go()
    assert transfer.wait_layer(0, rig.WAIT_S) and not transfer.done()
    assert transfer.layer_good(0).all() and same_layer(target, 0)
    assert not transfer.layer_good(1).any() and not same_layer(target, 1)
    assert rig.poll(lambda: len(tier.reads) == BLOCKS)
    assert {(span.start, span.stop) for span, _, _ in tier.reads} == {(12 << 10, 20 << 10)}
    tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all() and is_right(target, range(BLOCKS))
    assert engine.stats()["fetched_blocks"] == BLOCKS
    engine.check()


def test_a_layer_that_does_not_come(engine, tier, layered):
    transfer, target = begin_load(engine)
    tier.let_go(1, good=False)
    tier.let_go()
    assert rig.poll(lambda: len(tier.reads) == BLOCKS - 1)
    tier.let_go(1, good=False)
    tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.tolist() == [False] * 2 + [True] * 4
    assert transfer.layer_good(0).tolist() == [False] + [True] * 5
    with engine.match(keys_of(engine)) as lease:
        assert lease.blocks == BLOCKS and lease.in_memory == 0
    assert engine.stats()["memory_blocks"] == 4
    engine.check()


def test_no_layer_comes(engine, tier, layered):
    transfer, target = begin_load(engine)
    tier.let_go(good=False)
    assert transfer.wait(rig.WAIT_S) and not transfer.good.any() and is_right(target, [])
    engine.check()


@pytest.mark.parametrize("pieces_bytes", [8 << 10, 1 << 30])
def test_a_deadline_just_before_a_read_begins(engine, tier, monkeypatch, pieces_bytes):
    """The alarm rings once, while the window is not read: the read that hangs then holds no one."""
    monkeypatch.setattr("kvengine.load.PIECE_BYTES", pieces_bytes)
    begins = Load._begin

    def late(load, part, *given) -> None:
        part.alarm.cancel()
        load._too_late(part)
        begins(load, part, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Load, "_begin", late)
        transfer, target = begin_load(engine)
        assert transfer.wait(5.0) and not transfer.good.any()
    tier.let_go()
    tier.waiting = False
    assert rig.check_right(engine, keys_of(engine), SOURCE).all()
    engine.check()


@pytest.mark.parametrize("turn", [0, 1])
def test_a_piece_that_cannot_be_scattered(engine, tier, layered, monkeypatch, turn):
    """Its window is over, but keeps its slots while others of its pieces are still moved."""
    calls, scatter = [0], Load._scatter_piece

    def fails(load, part, at) -> None:
        calls[0] += 1
        if calls[0] == turn + 1:
            raise MemoryError("no room for it")
        scatter(load, part, at)

    with monkeypatch.context() as patch:
        patch.setattr(Load, "_scatter_piece", fails)
        transfer, target = begin_load(engine)
        tier.waiting = False
        tier.let_go()
        assert transfer.wait(5.0)
    assert transfer.error == "MemoryError: no room for it" and not transfer.good.all()
    assert rig.check_right(engine, keys_of(engine), SOURCE).all()
    engine.check()


def test_layers_scattered_just_as_the_next_have_come(engine, tier, layered, monkeypatch):
    """The window is not over between the end of a read and the scatter of what it brought."""
    go, passed, piece_done = threading.Event(), threading.Event(), Load._piece_done
    exits = [1 << 30]

    class Gate:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if threading.current_thread() is threading.main_thread():
                exits[0] -= 1
                if not exits[0]:
                    go.set()
                    assert passed.wait(rig.WAIT_S)

    def held_back(load, part) -> None:
        assert go.wait(rig.WAIT_S)
        piece_done(load, part)
        passed.set()

    monkeypatch.setattr("kvengine.load.threading", SimpleNamespace(Lock=Gate))
    monkeypatch.setattr(Load, "_piece_done", held_back)
    transfer, target = begin_load(engine)
    tier.let_go()
    assert rig.poll(lambda: len(tier.reads) == BLOCKS)
    exits[0] = BLOCKS  # the last report of the second read
    tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all() and is_right(target, range(BLOCKS))
    engine.check()


@pytest.mark.parametrize("begun", [0, 1])
def test_a_deadline_between_layers(engine, tier, layered, begun):
    transfer, target = begin_load(engine, timeout_s=0.2)
    if begun:
        tier.let_go()
        assert rig.poll(lambda: len(tier.reads) == BLOCKS)
    assert transfer.wait(rig.WAIT_S) and not transfer.good.any()
    assert transfer.layer_good(0).all() == bool(begun)
    before = [tuple(array.copy() for array in layer) for layer in target]
    assert engine._store._lent_pages > 0
    tier.let_go()
    assert rig.poll(lambda: engine._store._lent_pages == 0) and not tier.reads
    assert all(
        np.array_equal(a, b)
        for x, y in zip(before, target, strict=True)
        for a, b in zip((i.view(np.uint8) for i in x), (i.view(np.uint8) for i in y), strict=True)
    )
    tier.waiting = False
    assert rig.check_right(engine, keys_of(engine), SOURCE).all()
    engine.check()


@pytest.mark.parametrize("damaged", [None, 0, 1])
def test_layers_from_a_disk(tmp_path, layered, damaged):
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
    (segment,) = (tmp_path / "segments").iterdir()
    if damaged is not None:
        with segment.open("r+b") as file:
            data = file.read()
            layer = SOURCE[damaged][0].view(np.uint8)[3].tobytes()
            at = data.index(layer)
            file.seek(at)
            file.write(bytes([data[at] ^ 1]))
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M") as engine:
        good = rig.check_right(engine, keys_of(engine), SOURCE)
        assert good.tolist() == [damaged is None or block != 3 for block in range(BLOCKS)]
        assert engine.stats()["corrupt_blocks"] == int(damaged is not None)
        assert engine.stats()["fetched_blocks"] == good.sum()
        engine.check()


@pytest.mark.parametrize(
    ("header", "layers", "cuts"),
    [
        (4 << 10, [64 << 10] * 32, [(0, 8), (8, 16), (16, 24), (24, 32)]),
        (4 << 10, [1 << 20] * 3, [(0, 1), (1, 2), (2, 3)]),
        (4 << 10, [1000] * 1200, [(0, 1024), (1024, 1200)]),
        (4 << 10, [999_999] * 3, [(0, 3)]),
        (8 << 10, [4096], [(0, 1)]),
    ],
)
def test_frames_are_cut_between_layers_at_pages(header, layers, cuts):
    found = pieces(header, layers)
    assert [piece.layers for piece in found] == cuts
    assert found[0].start == 0 and found[-1].stop == header + sum(layers)
    assert all(one.stop == two.start for one, two in zip(found, found[1:], strict=False))
    assert all(piece.start % 4096 == 0 for piece in found)


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
    monkeypatch.setattr(engine._fetches, "share_bytes", 1)
    monkeypatch.setattr("kvengine.load.FETCH_BYTES", 1)
    transfer, target = begin_load(engine)
    for _ in range(BLOCKS):
        assert rig.poll(lambda: len(tier.reads) == 1)
        tier.let_go()
    assert transfer.wait(rig.WAIT_S) and transfer.good.all() and is_right(target, range(BLOCKS))
    engine.check()


def read_once(engine, keys, stream, *, first: int = 0) -> None:
    """Load all blocks, none of which arrives while the lease lasts: leased ones keep their room."""
    target, share = rig.caches(OF, len(keys)), engine._fetches.share_bytes
    engine._fetches.begin(share, np.inf, lambda in_time: None)
    with engine.match(keys) as lease:
        transfer = engine.load(lease, target, np.arange(len(keys)))
    engine._fetches.end(share)
    assert transfer.wait(rig.WAIT_S) and transfer.good.all()
    here, there = np.arange(len(keys)), np.arange(first, first + len(keys))
    assert rig.same(OF, target, rig.slots_of(OF, here), stream, rig.slots_of(OF, there))


def test_a_fetch_of_much_leaves_what_is_used_again(tmp_path, monkeypatch):
    """A prompt of many times the memory is read once: it recycles its own share."""
    with kvengine.open(f"mem://?size=1M | file://{tmp_path}?size=64M") as engine:
        # Room for the next save is made after one has ended: it might be made of what is used.
        monkeypatch.setattr(engine._store, "make_room", lambda namespace, count: None)
        names = rig.names(engine, OF)
        often, once = (
            names.keys(rig.prompt(count, OF, seed)) for seed, count in ((1, 20), (2, 120))
        )
        source, stream = rig.caches(OF, 20, 1), rig.caches(OF, 120, 2)
        for at in range(0, 120, 20):
            rig.save(engine, once[at : at + 20], stream, range(at, at + 20))
            assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        rig.save(engine, often, source)
        assert engine.flush(rig.WAIT_S)
        read_once(engine, once, stream)
        with engine.match(often) as lease:
            assert lease.in_memory == 20, "what a fetch has pushed out"
        # What is asked for again is one of those that stay, and free memory is for all.
        engine.squeeze(0)
        read_once(engine, once[:40], stream)
        for _ in range(2):
            with engine.match(once[:40]) as lease:
                assert lease.in_memory == 40
        read_once(engine, once[40:], stream, first=40)
        with engine.match(once[:40]) as lease:
            assert lease.in_memory >= 36
        engine.check()
