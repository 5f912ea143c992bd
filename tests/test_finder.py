"""The finder and several tiers below memory, over tiers that are dicts."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

import kvengine
import rig
from kvengine.engine import Engine
from kvengine.frame import frame_bytes
from kvengine.tiers.finder import Finder

OF = rig.layout()
FRAME = frame_bytes(OF)
BLOCKS = 6
SOURCE = rig.caches(OF, BLOCKS, 1)


class DictTier:
    """A tier in a dict, which reports at once. `held` may be shared, `away` fails all."""

    nbytes = 0

    def __init__(self, name: str, remote: bool = True, held: dict[bytes, bytes] | None = None):
        self.name, self.remote = name, remote
        self.held = {} if held is None else held
        self.away = False
        self.lost: Callable[[Sequence[bytes]], None] = lambda keys: None
        self.asked: list[int] = []

    def scan(self):
        return iter(())

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        self.asked.append(len(keys))
        return [-1 if self.away else len(self.held.get(key, b"")) for key in keys]

    def read(self, spans, deadline, report):
        for index, span in enumerate(spans):
            data = None if self.away else self.held.get(span.key)
            if data is not None:
                span.frame[: len(data)] = data
            if data is None and not self.away:
                self.lost([span.key])
            report(index, data is not None)

    def write(self, spans, deadline, report):
        for index, span in enumerate(spans):
            if not self.away:
                self.held[span.key] = bytes(span.frame[: span.nbytes])
            report(index, not self.away)

    def drop(self, keys):
        for key in keys:
            self.held.pop(key, None)

    def close(self):
        pass

    def detach(self):
        pass


def open_over(monkeypatch, *tiers: DictTier) -> Engine:
    def attach(engine: Engine) -> None:
        engine._tiers.extend(tiers)
        for number, tier in enumerate(tiers):
            tier.lost = partial(engine._lost, number)

    monkeypatch.setattr(Engine, "_open_tiers", attach)
    return kvengine.open("mem://?size=4M", secret="ab" * 32)


def keys_of(engine: Engine, seed: int = 0):
    return rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF, seed))


def finder(*tiers: DictTier, now: list[float], **options) -> Finder:
    return Finder(tiers, lambda: now[0], find_s=1.0, **options)


def test_asks_each_tier_for_what_the_ones_before_lack():
    disk, near, far = DictTier("disk", remote=False), DictTier("near"), DictTier("far")
    near.held = {b"a": b"12"}
    far.held = {b"a": b"12", b"b": b"34", b"c": b"other size"}
    found = finder(disk, near, far, now=[0.0]).find([b"a", b"b", b"c", b"d"], [2])
    assert found[:, 0].tolist() == [1, 2, -1, -1]
    assert (disk.asked, near.asked, far.asked) == ([], [4], [3])
    assert not finder(disk, now=[0.0]) and finder(near, now=[0.0])


def test_says_which_of_several_sizes_is_there():
    tier = DictTier("t")
    tier.held = {b"a": b"12", b"b": b"123", b"c": b"1"}
    found = finder(tier, now=[0.0]).find([b"a", b"b", b"c"], [3, 2])
    assert found.tolist() == [[0, 1], [0, 0], [-1, -1]]
    assert tier.asked == [3]


def test_remembers_for_a_moment_until_told_to_forget():
    now, tier = [0.0], DictTier("t")
    asking = finder(tier, now=now, remember_s=1.0)
    assert asking.find([b"a"], [1])[:, 0].tolist() == [-1]
    tier.held = {b"a": b"1"}
    assert asking.find([b"a", b"b"], [1])[:, 0].tolist() == [-1, -1]
    assert tier.asked == [1, 1]
    asking.forget([b"a", b"unknown"])
    assert asking.find([b"a", b"b"], [1])[:, 0].tolist() == [0, -1]
    now[0] = 1.5
    assert asking.find([b"a", b"b"], [1])[:, 0].tolist() == [0, -1]
    assert tier.asked == [1, 1, 1, 2]


def test_long_prompts_are_asked_for_in_growing_windows():
    keys = [bytes([number % 256, number // 256]) for number in range(5000)]
    for known, asked in ((0, [128]), (127, [128]), (128, [128, 1024]), (5000, [128, 1024, 3848])):
        tier = DictTier("t")
        tier.held = dict.fromkeys(keys[:known], b"1")
        found = finder(tier, now=[0.0]).find(keys, [1])
        assert (found[:, 0] == 0).sum() == known and tier.asked == asked


def test_no_answer_is_not_remembered():
    tier = DictTier("t")
    asking = finder(tier, now=[0.0])
    tier.away = True
    assert asking.find([b"a"], [1])[:, 0].tolist() == [-1]
    tier.away, tier.held = False, {b"a": b"1"}
    assert asking.find([b"a"], [1])[:, 0].tolist() == [0]


def test_answers_are_bounded_and_the_oldest_go():
    tier = DictTier("t")
    asking = finder(tier, now=[0.0], answers_max=4)
    for key in (b"1", b"2", b"3", b"4", b"5", b"6"):
        asking.find([key], [1])
    tier.asked.clear()
    asking.find([b"3", b"4", b"5", b"6"], [1])
    asking.find([b"2"], [1])
    assert tier.asked == [1]


def test_past_the_deadline_no_further_tier_is_asked():
    now, slow, last = [0.0], DictTier("slow"), DictTier("last")
    asking = finder(slow, last, now=now)
    slow.find = lambda keys, deadline: now.__setitem__(0, deadline) or [0] * len(keys)
    assert asking.find([b"a"], [1])[:, 0].tolist() == [-1]
    assert last.asked == []


def test_another_engine_finds_what_a_remote_tier_holds(monkeypatch):
    remote = DictTier("far")
    with open_over(monkeypatch, remote) as engine:
        assert rig.save(engine, keys_of(engine), SOURCE).good.all()
        assert engine.flush()
    assert len(remote.held) == BLOCKS
    with open_over(monkeypatch, remote) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS and engine.contains(keys).all()
        assert engine.stats()["blocks"] == 0
        with engine.match(keys) as lease:
            assert (lease.blocks, lease.in_memory) == (BLOCKS, 0)
            assert engine.stats()["far_blocks"] == BLOCKS
        assert engine.stats()["blocks"] == 0  # the index keeps no books of what it does not use
        assert rig.check_right(engine, keys, SOURCE).all()
        assert engine.stats()["memory_blocks"] == BLOCKS == engine.stats()["fetched_blocks"]
        engine.squeeze(0)
        assert engine.stats()["blocks"] == 0
        assert rig.check_right(engine, keys, SOURCE).all()
        assert engine.metrics.get("hit_blocks", tier="far") == 3 * BLOCKS
        engine.check()


def test_what_is_found_is_not_saved_again(monkeypatch):
    remote = DictTier("far")
    with open_over(monkeypatch, remote) as engine:
        rig.save(engine, keys_of(engine), SOURCE)
    with open_over(monkeypatch, remote) as engine:
        keys = keys_of(engine)
        with engine.match(keys):
            assert rig.save(engine, keys, SOURCE).nbytes == 0
        rig.check_right(engine, keys, SOURCE)
        assert engine.flush() and engine.stats()["demoted_blocks"] == 0
        engine.check()


def test_what_lies_beyond_a_block_being_filled_does_not_stay_in_the_index(monkeypatch):
    far = DictTier("far")
    with open_over(monkeypatch, far) as engine:
        assert engine.save(keys_of(engine), SOURCE, np.arange(BLOCKS)).wait()
        assert engine.flush()
    with open_over(monkeypatch, DictTier("far", held=far.held)) as engine:
        keys = keys_of(engine)
        filling = engine._store.reserve(keys[2:3])
        with engine.match(keys) as lease:
            assert lease.blocks == 2
            assert engine.stats()["blocks"] == 2
        assert engine.stats()["blocks"] == 0
        engine._store.abort(filling)
        engine.check()


def test_a_hole_is_found_and_what_follows_it_is_in_memory(monkeypatch):
    remote = DictTier("far")
    with open_over(monkeypatch, remote) as engine:
        rig.save(engine, keys_of(engine), SOURCE)
    with open_over(monkeypatch, remote) as engine:
        keys = keys_of(engine)
        tail = [tuple(a[3:] for a in layer) for layer in SOURCE]
        assert rig.save(engine, keys[3:], tail).good.all()
        with engine.match(keys) as lease:
            assert (lease.blocks, lease.in_memory) == (BLOCKS, 0)
        assert engine.metrics.get("hit_blocks", tier="far") == 3
        assert engine.metrics.get("hit_blocks", tier="memory") == 3
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_lost_between_find_and_load_is_a_miss(monkeypatch):
    remote = DictTier("far")
    with open_over(monkeypatch, remote) as engine:
        rig.save(engine, keys_of(engine), SOURCE)
    with open_over(monkeypatch, remote) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        del remote.held[keys.key(2)]
        good = rig.check_right(engine, keys, SOURCE)
        assert good.tolist() == [True, True, False, True, True, True]
        engine.check()
        assert rig.save(engine, keys, SOURCE).good.all()
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_every_tier_is_written_and_the_next_one_serves_what_one_has_lost(monkeypatch):
    near, far = DictTier("near", remote=False), DictTier("far")
    with open_over(monkeypatch, near, far) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush() and near.held == far.held and len(far.held) == BLOCKS
        engine.squeeze(0)
        assert engine.stats()["near_blocks"] == engine.stats()["far_blocks"] == BLOCKS
        near.away = True
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_a_wrong_byte_in_one_tier_costs_that_copy_only(monkeypatch):
    near, far = DictTier("near", remote=False), DictTier("far")
    with open_over(monkeypatch, near, far) as engine:
        keys = keys_of(engine)
        rig.save(engine, keys, SOURCE)
        assert engine.flush()
        engine.squeeze(0)
        near.held[keys.key(1)] = near.held[keys.key(1)][:-1] + b"?"
        assert (~rig.check_right(engine, keys, SOURCE)).sum() == 1
        assert keys.key(1) not in near.held and keys.key(1) in far.held
        assert engine.metrics.get("corrupt_blocks", tier="near") == 1
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.check()


def test_drop_reaches_what_only_others_have_seen(monkeypatch):
    remote = DictTier("far")
    with open_over(monkeypatch, remote) as engine:
        rig.save(engine, keys_of(engine), SOURCE)
    with open_over(monkeypatch, remote) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == BLOCKS
        assert engine.drop(keys[1:]) == 0  # none was held by this node
        assert list(remote.held) == [keys.key(0)]
        assert engine.probe(keys) == 1
        engine.check()


def test_a_remote_tier_that_lags_is_skipped_and_saves_go_on(monkeypatch):
    remote, held = DictTier("far"), []
    remote.write = lambda spans, deadline, report: held.extend(
        (report, index) for index in range(len(spans))
    )
    with open_over(monkeypatch, remote) as engine:
        for seed in range(2, 80):
            source = rig.caches(OF, BLOCKS, seed)
            assert rig.save(engine, keys_of(engine, seed), source).good.all(), seed
        skipped = engine.metrics.get("write_skipped_blocks", tier="far")
        assert skipped > 0 and len(held) < 78 * BLOCKS
        while held:
            report, index = held.pop()
            report(index, False)
        assert engine.flush()
        engine.check()


def test_a_tier_that_reports_at_once_is_not_called_within_itself(monkeypatch):
    remote, depth, deepest = DictTier("far"), threading.local(), [0]
    write = remote.write

    def watched(spans, deadline, report):
        depth.now = getattr(depth, "now", 0) + 1
        deepest[0] = max(deepest[0], depth.now)
        write(spans, deadline, report)
        depth.now -= 1

    remote.write = watched
    with open_over(monkeypatch, remote) as engine:
        transfers = [
            engine.save(keys_of(engine, seed), SOURCE, np.arange(BLOCKS)) for seed in range(20)
        ]
        assert all(transfer.wait(rig.WAIT_S) for transfer in transfers) and engine.flush()
    assert deepest == [1]


@pytest.mark.parametrize("remote", [True, False])
def test_a_tier_that_is_away_costs_hits_only(monkeypatch, remote):
    tier = DictTier("far", remote=remote)
    tier.away = True
    with open_over(monkeypatch, tier) as engine:
        keys = keys_of(engine)
        assert engine.probe(keys) == 0
        assert rig.save(engine, keys, SOURCE).good.all() and engine.flush()
        assert rig.check_right(engine, keys, SOURCE).all()
        engine.squeeze(0)
        assert engine.probe(keys) == 0
        engine.check()


@pytest.mark.parametrize("seed", range(3))
def test_two_engines_in_many_threads_over_shared_tiers(monkeypatch, seed):
    """Save, load, drop, evict, lose at random: what is called good is right, the books balance."""
    held: dict[bytes, bytes] = {}
    sources = {number: rig.caches(OF, BLOCKS, 40 + number) for number in range(4)}
    errors: list[BaseException] = []

    def work(engine: Engine, tier: DictTier, number: int) -> None:
        draw = np.random.default_rng([seed, number])
        try:
            for _ in range(40):
                which = int(draw.integers(4))
                first = int(draw.integers(BLOCKS))
                keys = keys_of(engine, 40 + which)[first:]
                source = [tuple(a[first:] for a in layer) for layer in sources[which]]
                deed = draw.integers(10)
                if deed < 4:
                    rig.save(engine, keys, source)
                elif deed < 7:
                    rig.check_right(engine, keys, source)
                elif deed == 7:
                    engine.squeeze(0)
                elif deed == 8:
                    with engine.match(keys):
                        engine.drop(keys[: int(draw.integers(len(keys)) + 1)])
                else:
                    tier.away = not tier.away
                    for key in list(held)[: int(draw.integers(4))]:
                        held.pop(key, None)
        except BaseException as error:  # told below
            errors.append(error)

    near, far, other = DictTier("near", remote=False), DictTier("far"), DictTier("far")
    far.held = other.held = held
    with open_over(monkeypatch, near, far) as one, open_over(monkeypatch, other) as two:
        threads = [
            threading.Thread(target=work, args=(*pair, number))
            for number, pair in enumerate([(one, far), (two, other)] * 3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert errors == []
        for engine, tier in ((one, far), (two, other)):
            tier.away = False
            assert engine.flush(rig.WAIT_S)
            engine.check()
            for number, source in sources.items():
                keys = keys_of(engine, 40 + number)
                # A drop may have met a tier after a save had: that copy is found lost when read.
                for _ in range(BLOCKS):
                    rig.save(engine, keys, source)
                    right = rig.check_right(engine, keys, source).all()
                    if right:
                        break
                assert right
            assert engine.flush(rig.WAIT_S)
            engine.check()
            assert engine.stats()["leases"] == engine.stats()["reservations"] == 0
