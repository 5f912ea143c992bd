"""Levels, times to live and hints: what leaves first, what stays, and that nothing is left over."""

import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

import kvengine
import rig
import test_policy
from kvengine.errors import ConfigError
from kvengine.policy import retention
from kvengine.policy.adaptive import Adaptive
from kvengine.policy.lru import LRU
from kvengine.policy.retention import NEVER, USUAL, Retained
from kvengine.retention import Retention
from test_policy import IDS, PAGE_BYTES, Conformance, entries, evict, run

OF = rig.layout()


def keep(policy, *ids, level=USUAL, until=NEVER, over=NEVER, now=0.0, new=True):
    asked = entries(*ids)
    return policy.keep(asked, np.full(len(ids), new, np.int32), level, until, over, now)


def expired(policy, now):
    found = []
    for victims in policy.expired(now):
        policy.removed(victims)
        found += victims.tolist()
    return found


class Asked(Conformance):
    """The suite, while blocks are given levels, ends and hints."""

    @rule(data=st.data(), level=st.integers(0, 100), lasts=st.sampled_from([0.5, 3.0, NEVER]))
    def ask(self, data, level, lasts):
        ids, now = self.draw(data), self.tick()
        new = data.draw(st.booleans())
        known = keep(self.policy, *ids, level=level, until=now + lasts, now=now, new=new)
        assert known == sum(i in self.blocks for i in ids)

    @rule(data=st.data(), ttl_s=st.sampled_from([0.25, 2.0, 100.0]))
    def limit(self, data, ttl_s):
        now = self.tick()
        keep(self.policy, *self.draw(data), over=now + ttl_s, now=now)

    @rule(data=st.data(), branch=st.booleans())
    def end(self, data, branch):
        self.policy.end(entries(-1, *self.draw(data)), self.tick(), branch=branch)

    @rule(data=st.data())
    def expect(self, data):
        now = self.tick()
        self.policy.expect(entries(*self.draw(data)), now + 2.0, now)

    @rule()
    def expire(self):
        for victims in self.policy.expired(self.tick()):
            for number in victims.tolist():
                self.check_victim(number)
                self.forget(number)
            self.policy.removed(victims)

    @rule(nbytes=st.integers(0, 12 * PAGE_BYTES))
    def ask_twice(self, nbytes):
        """At one time: levels end as it passes."""
        now = self.tick()
        first = next(self.policy.victims(nbytes, now), entries())
        again = next(self.policy.victims(nbytes, now), entries())
        assert again.tolist() == first.tolist()

    def teardown(self):
        super().teardown()
        policy = self.policy
        nodes = policy._nodes.reshape(-1, retention.WIDTH)
        ends = np.arange(retention.LEVELS)
        assert policy._alarms == 0 and (policy._places == -1).all()
        assert (nodes[: retention.LEVELS, : retention.PARENT] == ends[:, None]).all()
        assert not nodes[retention.LEVELS :, retention.FLAGS].any()


@pytest.mark.parametrize("inner", [LRU, Adaptive])
def test_conformance_with_all_that_can_be_asked(inner):
    run_state_machine_as_test(
        lambda: Asked(lambda: Retained(inner())),
        settings=settings(max_examples=test_policy.EXAMPLES, stateful_step_count=40),
    )


def test_low_levels_go_first_and_high_ones_last():
    policy = Retained()
    for number in range(6):
        policy.added(run(number), 0.0)
    for number, level in ((0, 90), (1, 60), (3, 40), (5, 0)):
        assert keep(policy, number, level=level) == 1
    assert evict(policy) == [5, 3, 2, 4, 1, 0]
    assert keep(policy, 0, IDS, -1, level=3) == 0


def test_a_level_lasts_its_duration():
    policy = Retained()
    for number in range(3):
        policy.added(run(number), 0.0)
    keep(policy, 0, level=90, until=10.0)
    keep(policy, 2, level=1, until=10.0)
    assert list(next(policy.victims(PAGE_BYTES, 9.0))) == [2]
    assert [v.tolist() for v in policy.victims(PAGE_BYTES, 10.0)] == [[1]]
    assert evict(policy) == [1, 2, 0]


def test_a_parent_stays_for_its_child():
    policy = Retained()
    policy.added(run(0, 1, 2), 0.0)
    policy.added(run(3), 0.0)
    keep(policy, 0, 1, level=0)
    keep(policy, 2, level=100)
    assert evict(policy) == [3, 2, 1, 0]


def test_blocks_held_before_are_only_kept_better():
    policy = Retained()
    for number in range(4):
        policy.added(run(number), 0.0)
    keep(policy, 0, level=80, over=20.0)
    keep(policy, 0, 1, level=10, over=5.0, new=False)
    assert expired(policy, 19.0) == []
    keep(policy, 0, over=30.0, new=False, now=19.0)
    assert expired(policy, 29.0) == [] and expired(policy, 30.0) == [0]
    assert evict(policy) == [1, 2, 3]


def test_what_has_outlived_its_time_goes_leaf_first():
    policy = Retained()
    policy.added(run(0, 1), 0.0)
    policy.added(run(2, parent=1, position=2), 0.0)
    keep(policy, 0, 1, over=5.0)
    keep(policy, 1, level=100)
    assert expired(policy, 5.0) == []  # a child is here
    policy.removed(entries(2))
    policy.held(entries(1))
    assert expired(policy, 5.0) == []
    policy.freed(entries(1))
    assert expired(policy, 5.0) == [1, 0] and evict(policy) == []


def test_hints_last_until_a_use_and_lower_nothing_raised():
    policy = Retained()
    policy.added(run(0, 1, 2), 0.0)
    policy.added(run(3, parent=0, position=1), 0.0)
    policy.added(run(4), 0.0)
    assert policy.end(entries(0, 1, 2), 0.0, branch=True) == 3
    assert next(policy.victims(3 * PAGE_BYTES, 0.0)).tolist() == [2, 1]
    policy.touched(run(0, 1, 2), 0.0)
    assert policy.expect(entries(0, 3), 10.0, 0.0) == 2
    assert next(policy.victims(2 * PAGE_BYTES, 0.0)).tolist() == [4, 2]
    keep(policy, 4, level=70)
    policy.end(entries(4, 2), 0.0)
    assert evict(policy, 2 * PAGE_BYTES) == [2, 1]
    assert evict(policy) == [4, 3, 0]


def test_alarms_are_bounded():
    policy = Retained()
    policy.added(run(0), 0.0)
    for second in range(1000):
        keep(policy, 0, over=1e6 + second)
    assert policy._alarms == 1 and expired(policy, 1e6 + 998) == []
    assert expired(policy, 1e6 + 999) == [0] and policy._alarms == 0


@pytest.mark.parametrize(
    ("first", "last", "position", "expected"),
    [
        (0, None, 0, range(8)),
        (0, 16, 0, range(1)),
        (17, 33, 0, range(1, 3)),
        (0, 64, 4, range(0)),
        (70, 100, 4, range(3)),
        (1000, None, 0, range(0)),
    ],
)
def test_tokens_to_blocks(first, last, position, expected):
    part = Retention(first_token=first, last_token=last).blocks(position, 8, 16)
    assert range(8)[part] == expected or not len(range(8)[part]) and not len(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": -1},
        {"priority": 101},
        {"priority": 0.5},
        {"ttl_s": -1.0},
        {"ttl_s": 0.0},
        {"duration_s": float("nan")},
        {"first_token": -1},
        {"first_token": 5, "last_token": 5},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match="given .* expected"):
        Retention(**wrong)


def test_hints_and_lives_that_cannot_be_are_refused():
    with kvengine.open("mem://?size=1M") as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(2, OF))
        for wrong in ({}, {"session_end": True, "branch_done": True}, {"prefetch": True}):
            with pytest.raises(ConfigError, match="give one of"):
                engine.hint(keys, **wrong)
        with pytest.raises(ConfigError, match="expect_resume_in: given -1"):
            engine.hint(keys, expect_resume_in=-1)
        with pytest.raises(ConfigError, match="ttl_s: given -1"):
            rig.names(engine, OF, ttl_s=-1)
        assert engine.hint(keys, session_end=True) == 0
        assert engine.metrics.get("hint_unknown_blocks") == 2


def test_a_life_that_is_over_is_a_miss(monkeypatch):
    with kvengine.open("mem://?size=4M", threads=1, lossless=False) as engine:
        clock = [0.0]
        monkeypatch.setattr(engine._store, "_clock", lambda: clock[0])
        caches = rig.caches(OF, 6, seed=1)
        limited = rig.names(engine, OF, salt="limited", ttl_s=10).keys(rig.prompt(6, OF))
        plain = rig.names(engine, OF).keys(rig.prompt(6, OF))
        rig.save(engine, limited, caches)
        asked = Retention(ttl_s=20, first_token=3 * OF.block_tokens)
        rig.save(engine, plain, caches, retention=asked)
        for now, (left, held) in {9.0: (6, 6), 10.0: (0, 6), 19.0: (0, 6), 20.0: (0, 3)}.items():
            clock[0] = now
            assert rig.check_right(engine, limited, caches).sum() == left
            assert rig.check_right(engine, plain, caches).sum() == held
        assert engine.metrics.get("evicted_blocks", reason="time") == 9
        engine.check()


def test_a_life_is_over_while_others_read_on(monkeypatch):
    """A lease keeps its bytes, and a block that continues it stays; nobody matches it again."""
    with kvengine.open("mem://?size=4M", threads=1, lossless=False) as engine:
        clock = [0.0]
        monkeypatch.setattr(engine._store, "_clock", lambda: clock[0])
        caches, target = rig.caches(OF, 6, seed=1), rig.caches(OF, 6)
        keys = rig.names(engine, OF).keys(rig.prompt(6, OF))
        rig.save(engine, keys, caches, retention=Retention(ttl_s=10, last_token=OF.block_tokens))
        with engine.match(keys) as lease:
            clock[0] = 11.0
            assert engine.match(keys).blocks == 0 == engine.probe(keys)
            transfer = engine.load(lease, target, np.arange(6))
            assert transfer.wait(rig.WAIT_S) and transfer.good.all()
        assert engine.match(keys[1:]).blocks == 5
        rig.save(engine, keys, caches, retention=Retention(ttl_s=10, last_token=OF.block_tokens))
        assert rig.check_right(engine, keys, caches).all()
        clock[0] = 22.0
        assert engine.match(keys).blocks == 0, "a child is no reason to live on"
        assert engine.metrics.get("evicted_blocks", reason="time") == 2
        engine.check()


def test_a_life_that_is_over_is_over_in_tiers_too(monkeypatch, tmp_path):
    """After a restart as well, and where memory had given the block up before."""
    url, clock = f"mem://?size=4M | file://{tmp_path}/kv?size=16M", [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    caches = rig.caches(OF, 6, seed=1)
    for opened in range(2):
        with kvengine.open(url, threads=1, lossless=False) as engine:
            limited = rig.names(engine, OF, salt="limited", ttl_s=10).keys(rig.prompt(6, OF))
            plain = rig.names(engine, OF).keys(rig.prompt(6, OF))
            if not opened:
                rig.save(engine, limited, caches)
                rig.save(engine, plain, caches)
                assert engine.flush(rig.WAIT_S)
            engine.squeeze(0)
            assert rig.check_right(engine, limited, caches).all()
            engine.squeeze(0)
            clock[0] = 1010.0 if opened else 1009.0
            assert rig.check_right(engine, limited, caches).all() == (not opened)
            assert rig.check_right(engine, plain, caches).all()
            engine.check()
            if opened:
                assert not rig.check_right(engine, limited, caches).any()
                assert engine.metrics.get("expired", kind="block") == 6
                assert engine.stats()["corrupt_blocks"] == 0
                rig.save(engine, limited, caches)
                engine.squeeze(0)
                assert rig.check_right(engine, limited, caches).all()


def test_what_expires_in_memory_leaves_the_tiers(monkeypatch, tmp_path):
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}/kv?size=16M", lossless=False) as engine:
        clock = [0.0]
        monkeypatch.setattr(engine._store, "_clock", lambda: clock[0])
        keys = rig.names(engine, OF, ttl_s=10).keys(rig.prompt(6, OF))
        rig.save(engine, keys, rig.caches(OF, 6, seed=1))
        assert engine.flush(rig.WAIT_S) and engine.stats()["disk_blocks"] == 6
        clock[0] = 11.0
        assert engine.match(keys).blocks == 0 == engine.probe(keys)
        assert engine.stats()["disk_blocks"] == 0 == engine.stats()["tier_bytes"]
        engine.check()


def test_a_block_that_comes_back_brings_its_life(monkeypatch, tmp_path):
    """Its frame says until when, to an engine that has never heard of it."""
    url = f"mem://?size=4M | file://{tmp_path}/kv?size=16M"
    caches = rig.caches(OF, 6, seed=1)
    with kvengine.open(url, lossless=False) as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(6, OF))
        rig.save(engine, keys, caches, retention=Retention(ttl_s=1000))
    with kvengine.open(url, lossless=False) as engine:
        start = time.monotonic()
        clock = [start]
        monkeypatch.setattr(engine._store, "_clock", lambda: clock[0])
        keys = rig.names(engine, OF).keys(rig.prompt(6, OF))
        assert rig.check_right(engine, keys, caches).all()
        assert engine.stats()["memory_blocks"] == 6
        clock[0] = start + 900.0
        with engine.match(keys) as lease:
            assert lease.in_memory == 6
        clock[0] = start + 1002.0
        assert engine.match(keys).blocks == 0
        assert engine.metrics.get("evicted_blocks", reason="time") == 6


def test_priorities_and_hints_in_a_live_engine():
    with kvengine.open("mem://?size=4M", threads=1, lossless=False) as engine:
        names, caches = rig.names(engine, OF), rig.caches(OF, 8, seed=1)
        dear, cheap, usual = (names.keys(rig.prompt(8, OF, seed=seed)) for seed in range(3))
        rig.save(engine, dear, caches, retention=Retention(priority=100))
        rig.save(engine, usual, caches)
        rig.save(engine, cheap, caches, retention=[Retention(priority=0, duration_s=3600)])
        block = engine.stats()["memory_bytes"] // 24
        engine.squeeze(16 * block)
        assert [engine.probe(k) for k in (dear, usual, cheap)] == [8, 8, 0]
        engine.squeeze(8 * block)
        assert [engine.probe(k) for k in (dear, usual, cheap)] == [8, 0, 0]
        rig.save(engine, usual, caches)
        rig.save(engine, cheap, caches)
        assert engine.hint(cheap, session_end=True) == 8
        assert engine.hint(usual, expect_resume_in=3600, prefetch=True) == 8
        engine.squeeze(16 * block)
        assert [engine.probe(k) for k in (dear, usual, cheap)] == [8, 8, 0]
        assert rig.check_right(engine, usual, caches).all()
        engine.squeeze(0)
        assert engine.stats()["memory_blocks"] == 0
        engine.check()
