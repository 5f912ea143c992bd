"""Shadows hit what the policies would, and live: on all blocks exactly, on a sample nearly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvengine
import rig
from kvengine.keys import BlockKeys, Namespace
from kvengine.metrics import Metrics
from kvengine.policy import Request
from kvengine.policy.named import POLICIES
from kvengine.shadow import LIVE, Shadow, Shadows
from kvengine.trace import Trace, simulate
from test_trace import drawn

OF = rig.layout()
WORDS = np.frombuffer(np.random.default_rng(9).bytes(32 * 16384), np.uint8).reshape(-1, 32)


@pytest.fixture(scope="module")
def names() -> Namespace:
    with kvengine.open("mem://?size=1M") as engine:
        return rig.names(engine, OF)


def named(names: Namespace, trace: Trace) -> tuple[Trace, list[BlockKeys]]:
    """The keys of each request, and the trace with their prints."""
    prints = WORDS[: trace.unique, :8].copy().view(np.int64).reshape(-1)
    keys = [names.keys_of(WORDS[trace.path(r)].tobytes()) for r in range(trace.requests)]
    return Trace(**(vars(trace) | {"prints": prints})), keys


def nothing(blocks: np.ndarray) -> None:
    """No cost is known."""


def played(trace: Trace, keys: list[BlockKeys], shadows: Shadows, computing=nothing) -> Shadows:
    """Each request as if an engine of unlimited memory were asked, so that all is brought."""
    for r in range(trace.requests):
        request = Request(int(trace.output_tokens[r]), int(trace.stops[r]), 1)
        now = float(trace.seconds[r])
        shadows.asked(keys[r], 0, len(keys[r]), 1, request, computing, now)
    return shadows


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_shadows_hit_what_a_replay_hits(names, share):
    trace, keys = named(names, drawn(500, 3))
    blocks = int(trace.unique * share)
    seen = played(trace, keys, Shadows(list(POLICIES), blocks, Metrics())).seen()
    for name, make in POLICIES.items():
        expected = simulate(trace, make(), blocks, evicted=lambda r, gone: None)
        assert (seen[name].lookup_blocks, seen[name].hit_blocks) == (
            expected.accesses,
            expected.hits,
        ), name
    assert seen[LIVE].hit_blocks == 0


@pytest.mark.parametrize("name", ["lru", "arc", "adaptive"])
def test_a_sample_is_near(names, name):
    """A twentieth of the blocks, and of the room for them."""
    trace, keys = named(names, drawn(2500, 4, sessions=80))
    blocks, most = int(trace.unique * 0.2), 48
    shadows = played(trace, keys, Shadows([name], blocks, Metrics(), most))
    seen = shadows.seen()[name]
    expected = simulate(trace, POLICIES[name](), blocks)
    assert blocks > 8 * most
    assert seen.lookup_blocks == expected.accesses
    assert abs(seen.hit_ratio - expected.hit_ratio) < 0.05
    assert shadows.nbytes < 8 << 20


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_books_balance(names, data):
    """Any look-ups and saves: never over the room, and ids of what is held alone."""
    most = data.draw(st.integers(4, 30))
    shadows = Shadows(["lru", "arc"], data.draw(st.integers(1, 200)), Metrics(), most)
    paths = [WORDS[:40], np.concatenate([WORDS[:7], WORDS[100:140]]), WORDS[200:260]]
    for now in range(data.draw(st.integers(1, 25))):
        keys = names.keys_of(data.draw(st.sampled_from(paths)).tobytes())
        stop = data.draw(st.integers(1, len(keys)))
        start = data.draw(st.integers(0, stop - 1))
        pages = data.draw(st.integers(1, 3))
        if data.draw(st.booleans()):
            held = data.draw(st.integers(0, stop))
            shadows.asked(keys[:stop], held, held, pages, None, nothing, float(now))
        else:
            shadows.saved(keys[start:stop], pages, float(now))
        held_by = np.zeros(len(shadows._prints), dtype=int)
        for shadow in shadows._shadows.values():
            shadow.fit(len(held_by))
            here = shadow._pages[: len(held_by)]
            held_by += here != 0
            assert shadow.blocks == (here != 0).sum() <= most
            room = shadows._pages // (shadows._mask + 1)
            assert shadow.free_pages == room - here.sum()
        assert held_by.tolist() == shadows._holders
        assert sorted(shadows._ids.values()) == np.flatnonzero(held_by).tolist()
        free = set(shadows._free)
        assert len(free) == len(shadows._free) == (held_by == 0).sum()


def test_saves_that_continue_a_look_up_are_known(names):
    """Chunk by chunk, as a serving engine saves while it computes."""
    shadows = Shadows(["lru"], 1000, Metrics())
    keys = names.keys_of(WORDS[:30].tobytes())
    shadows.asked(keys, 0, 0, 1, None, nothing, 0.0)
    for start in range(0, 30, 7):
        shadows.saved(keys[start : start + 7], 1, 1.0)
    longer = names.keys_of(WORDS[:50].tobytes())
    shadows.asked(longer, 30, 30, 1, None, nothing, 2.0)
    shadows.saved(longer[30:], 1, 3.0)
    shadows.asked(longer, 50, 50, 1, None, nothing, 4.0)
    seen = shadows.seen()
    assert (seen["lru"].hit_blocks, seen["lru"].lookup_blocks) == (80, 130)
    assert seen[LIVE].hit_blocks == 80
    policy = shadows._shadows["lru"].policy
    taken = [int(each) for gone in policy.victims(4096 * 50, 5.0) for each in gone]
    assert [shadows._prints[each] for each in taken] == longer.prints[::-1].tolist()


def test_keys_twice_in_a_table_do_no_harm(names):
    shadows = Shadows(["lru"], 1000, Metrics())
    twice = names.keys_of(WORDS[[0, 1, 0]].tobytes())
    shadows.saved(twice, 1, 0.0)
    shadows.asked(twice, 3, 3, 1, None, nothing, 1.0)
    assert shadows.seen()["lru"].hit_blocks == 0


def test_saved_seconds_are_those_of_the_blocks_hit(names):
    shadows = Shadows(["lru", "s3fifo"], 1000, Metrics())
    keys = names.keys_of(WORDS[:10].tobytes())
    for _ in range(2):
        shadows.asked(keys, 4, 10, 1, None, lambda blocks: blocks * (blocks + 1) / 2, 0.0)
    seen = shadows.seen()
    assert seen["lru"].saved_prefill_s == seen["s3fifo"].saved_prefill_s == 55.0
    assert seen[LIVE].saved_prefill_s == 20.0


# In an engine


def test_a_shadow_of_the_policy_sees_what_the_engine_sees():
    """No pressure: the same hits exactly; and the counters say them."""
    with kvengine.open("mem://?size=16M&shadow=lru,arc") as engine:
        assert engine.warm(60)
        names, cache = rig.names(engine, OF), rig.caches(OF, 64, 0)
        for position, tokens in ((0, 160), (0, 320), (160, 160), (320, 640)) * 2:
            engine.observe_prefill(names, position, tokens, tokens / 320)
        for blocks in (4, 9, 9, 20, 2):
            keys = names.keys(rig.prompt(blocks, OF))
            with engine.match(keys) as lease:
                held = lease.blocks
            if held < blocks:
                rig.save(engine, keys[held:], cache)
        seen, stats = engine.shadows(), engine.stats()
        assert seen["lru"] == seen["arc"] == seen[LIVE]
        assert (seen["lru"].hit_blocks, seen["lru"].lookup_blocks) == (24, 44)
        assert seen["lru"].saved_prefill_s == pytest.approx(24 * 16 / 160 * 0.5, rel=0.01)
        assert stats["shadow_arc_hit_blocks"] == 24 == stats["hit_blocks"]
        assert engine.metrics.get("shadow_missed_blocks", policy="arc") == 20
        assert engine.metrics.get("shadow_lookup_blocks") == 44


def test_a_shadow_under_pressure_is_near_the_engine():
    trace = drawn(300, 5)
    size = int(trace.unique * 0.2) * 5 * 4096  # a block takes five pages
    with kvengine.open("mem://", memory_bytes=size, shadow="lru", lossless=False) as engine:
        assert engine.warm(60)
        trace, keys = named(rig.names(engine, OF), trace)
        cache = rig.caches(OF, 256, 0)
        for each in keys:
            with engine.match(each) as lease:
                held = lease.blocks
            if held < len(each):
                rig.save(engine, each[held:], cache)
        seen = engine.shadows()
        assert 0.2 < seen[LIVE].hit_ratio < 0.95
        assert abs(seen["lru"].hit_ratio - seen[LIVE].hit_ratio) < 0.05


def test_no_shadow_unless_it_is_asked_for():
    with kvengine.open("mem://?size=1M") as engine:
        assert engine.warm(60)
        engine.match(rig.names(engine, OF).keys(rig.prompt(3, OF))).release()
        assert engine.shadows() == {}
        assert not any(name.startswith("shadow") for name in engine.stats())


def test_shadow_fits_ids_that_come_later():
    shadow = Shadow(POLICIES["lru"](), 4)
    shadow.fit(9)
    none = np.empty(0, np.int32)
    path, prints = np.arange(5, dtype=np.int32), np.arange(5)
    taken = shadow.put(none, path, prints, 0, Request(), 0.0, lambda gone: None)
    assert taken.tolist() == [0, 1, 2, 3] and shadow.free_pages == 0
    assert shadow.look(path, prints, Request(), 1.0, lambda gone: None) == 4
