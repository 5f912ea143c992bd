"""Pools of one prompt: the longest start that all of them can go on from, and what is kept."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import kvengine
import rig
from kvengine import formats
from kvengine.errors import LayoutError
from kvengine.layout import Layout
from kvengine.pools import PoolMatch, longest, needed
from kvengine.retention import Retention
from test_daemon import Daemon

FULL = rig.layout()
WINDOW = rig.layout(attention="sliding", window_tokens=33, sink_tokens=16)  # 2 blocks and a sink
STATE = Layout.opaque(
    layers=1, page_bytes=4096, block_tokens=16, permutation="s", attention="state"
)

DEPTH, PROMPTS = 8, 3
PROMPT, BLOCKS = st.integers(0, PROMPTS - 1), st.integers(1, DEPTH)


def brute(held, layouts) -> int:
    """Every length, the longest first, block by block."""
    step = math.lcm(*(layout.block_tokens for layout in layouts))
    tokens = min(
        len(here) * of.block_tokens // step for here, of in zip(held, layouts, strict=True)
    )
    for length in range(tokens * step, -1, -step):
        if all(enough(here, of, length) for here, of in zip(held, layouts, strict=True)):
            return length
    raise AssertionError("nothing is always enough")


def enough(held, of: Layout, tokens: int) -> bool:
    """Whether each token that the next one looks at lies in a block that is held."""
    size = of.block_tokens
    if of.attention == "full":
        looks = range(tokens)
    elif of.attention == "state":
        looks = range(max(0, tokens - 1), tokens)
    else:
        recent = range(max(0, tokens - of.window_tokens + 1), tokens)
        looks = {*range(min(of.sink_tokens, tokens)), *recent}
    return all(held[token // size] for token in looks)


@st.composite
def pools(draw) -> tuple[list[np.ndarray], list[Layout]]:
    layouts, held = [], []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from([2, 4, 6]))
        kind = draw(st.sampled_from(["full", "sliding", "state"]))
        window = draw(st.integers(1, 40)) if kind == "sliding" else 0
        sinks = draw(st.integers(0, 9)) if kind == "sliding" else 0
        layouts.append(
            Layout(
                1, 1, 8, 0, "uint8", size, attention=kind, window_tokens=window, sink_tokens=sinks
            )
        )
        bits = draw(st.lists(st.integers(0, 9).map(lambda at: at > 0), max_size=12))
        held.append(np.array(bits, dtype=np.bool_))
    return held, layouts


@settings(max_examples=300, deadline=None)
@given(pools(), st.data())
def test_the_longest_start_is_what_every_token_needs(given_pools, data):
    held, layouts = given_pools
    tokens = longest(held, layouts)
    assert tokens == brute(held, layouts)
    for here, of in zip(held, layouts, strict=True):
        parts = needed(of, tokens // of.block_tokens)
        assert all(here[part].all() for part in parts)
        assert all(a.stop < b.start for a, b in zip(parts, parts[1:], strict=False))
    most = data.draw(st.integers(0, tokens))
    assert longest(held, layouts, most) <= most


def saved(engine, layouts, blocks=12, seed=0, **how):
    """Each pool's keys and caches of one prompt, saved."""
    tables, caches = [], []
    for at, of in enumerate(layouts):
        names = rig.names(engine, of, pool=f"{of.attention} {at}")
        tokens = np.random.default_rng(seed).integers(0, 999, blocks * 16)
        tables.append(names.keys(tokens))
        caches.append(rig.caches(of, len(tables[-1]), seed + at))
        rig.save(engine, tables[-1], caches[-1], **how)
    return tables, caches


def check_right(engine, match, tables, caches) -> None:
    """What is loaded is what was saved, in the places that are needed."""
    for leases, keys, source in zip(match.leases, tables, caches, strict=True):
        of = keys.namespace.layout
        target = rig.caches(of, len(keys))
        places: list[int] = []
        for lease in leases:
            table = lease.keys.position + np.arange(lease.blocks)
            assert engine.load(lease, target, table).wait(rig.WAIT_S)
            places += table.tolist()
        there = rig.slots_of(of, places)
        assert rig.same(of, target, there, source, there)
        blocks = match.tokens // of.block_tokens
        for part in needed(of, blocks):
            assert set(range(blocks)[part]) <= set(places)


def test_the_middle_of_a_window_may_go():
    with kvengine.open("mem://?size=8M", lossless=False) as engine:
        tables, caches = saved(engine, (FULL, WINDOW, STATE))
        with engine.match_pools(tables) as match:
            assert match.tokens == 192
            check_right(engine, match, tables, caches)
        full, window, state = tables
        assert engine.drop(window[1:10]) == 9 and engine.drop(state[:11]) == 11
        with engine.match_pools(tables) as match:
            assert match.tokens == 192
            assert [[lease.blocks for lease in leases] for leases in match.leases] == [
                [12],
                [1, 2],
                [1],
            ]
            check_right(engine, match, tables, caches)
        engine.check()


def test_a_prompt_is_hit_as_far_as_all_pools_go_on():
    with kvengine.open("mem://?size=8M", lossless=False) as engine:
        tables, caches = saved(engine, (FULL, WINDOW))
        full, window = tables
        engine.drop(window[10:11])
        with engine.match_pools(tables) as match:
            assert match.tokens == 160  # blocks 8 and 9 are there
            check_right(engine, match, tables, caches)
        engine.drop(full[5:])
        with engine.match_pools(tables) as match:
            assert match.tokens == 80
        engine.drop(window[:1])
        with engine.match_pools(tables) as match:
            assert match.tokens == 0 and match.leases == [[], []]
        assert engine.match_pools([full]).tokens == 80


def test_pools_of_other_block_sizes():
    with kvengine.open("mem://?size=8M", lossless=False) as engine:
        coarse = rig.layout(block_tokens=48)
        tables, caches = saved(engine, (coarse, WINDOW), 15)
        with engine.match_pools(tables) as match:
            assert match.tokens == 240  # five blocks of 48, fifteen of 16
            check_right(engine, match, tables, caches)
        engine.drop(tables[1][14:])
        with engine.match_pools(tables) as match:
            assert match.tokens == 192
            check_right(engine, match, tables, caches)


def test_under_pressure_windows_keep_their_ends_and_full_attention_its_start():
    with kvengine.open("mem://?size=8M", lossless=False, threads=1) as engine:
        tables, _ = saved(engine, (FULL, WINDOW), 24)
        full, window = tables
        engine.match_pools(tables).release()
        engine.squeeze(engine.stats()["memory_bytes"] * 5 // 8)
        held = engine.contains(window)
        assert held[0] and held[-2:].all() and not held[1:12].any()
        prefix = engine.contains(full)
        assert prefix[: int(prefix.sum())].all()  # closed
        assert engine.match_pools(tables).tokens > 0
        engine.check()


def test_a_fresh_window_leaves_from_its_middle_before_anyone_has_asked():
    with kvengine.open("mem://?size=8M", lossless=False, threads=1) as engine:
        (window,), _ = saved(engine, (WINDOW,), 12)
        for left in range(11, 0, -1):
            engine.squeeze(left * engine.stats()["memory_bytes"] // (left + 1))
            held = engine.contains(window)
            assert held[0] and held[13 - left :].all() and held.sum() == left


def test_windows_in_tiers(tmp_path):
    url = f"mem://?size=8M | file://{tmp_path}/kv?size=64M"
    with kvengine.open(url, lossless=False) as engine:
        tables, caches = saved(engine, (FULL, WINDOW))
        assert engine.flush(rig.WAIT_S)
        engine.squeeze(0)
        with engine.match_pools(tables) as match:
            assert match.tokens == 192
            check_right(engine, match, tables, caches)
        with engine.match_pools(tables) as match:
            assert sum(lease.in_memory for lease in match.leases[1]) == 3
            check_right(engine, match, tables, caches)
        engine.check()


def test_levels_and_windows_go_together():
    with kvengine.open("mem://?size=8M", lossless=False) as engine:
        (window,), _ = saved(engine, (WINDOW,), 12, retention=Retention(priority=90, last_token=64))
        engine.squeeze(engine.stats()["memory_bytes"] // 3)
        assert engine.contains(window).tolist() == [True] * 4 + [False] * 8


def test_recordings_and_shadows_hear_of_the_whole_prompt_alone(tmp_path):
    with kvengine.open("mem://?size=8M&shadow=lru", record=tmp_path / "asked.jsonl") as engine:
        engine.warm()
        tables, _ = saved(engine, (FULL, WINDOW))
        engine.match_pools(tables).release()
        assert engine.shadows()["lru"].lookup_blocks == 12 == engine.shadows()["lru"].hit_blocks
    assert len(formats.read(tmp_path / "asked.jsonl", 16).nodes) == 12


def test_what_does_not_fit_is_said():
    with kvengine.open("mem://?size=8M") as engine:
        (full, window), _ = saved(engine, (FULL, WINDOW), 4)
        with pytest.raises(LayoutError, match="no pools: give the keys of at least one"):
            engine.match_pools([])
        with pytest.raises(
            LayoutError, match="the keys of pool 1 begin at block 2, expected whole prompts"
        ):
            engine.match_pools([full, window[2:]])
    closed = engine.match_pools([full, window])
    assert closed.tokens == 0


class TwoPools(RuleBasedStateMachine):
    """Any saves, look-ups, pins, levels and pressure: what is asked for holds, all of it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = kvengine.open("mem://?size=512K", lossless=False, threads=1)
        self.names = [rig.names(self.engine, of, pool=of.attention) for of in (FULL, WINDOW)]
        self.caches = [rig.caches(of, DEPTH, 1) for of in (FULL, WINDOW)]
        self.pinned: dict[tuple[int, bytes], None] = {}
        self.matches: list[PoolMatch] = []

    def keys(self, which: int, prompt: int, blocks: int):
        """Prompts share their first three blocks."""
        tokens = rig.prompt(DEPTH, FULL)[: 3 * 16].tolist()
        tokens += rig.prompt(DEPTH, FULL, seed=1 + prompt)[: (DEPTH - 3) * 16].tolist()
        return self.names[which].keys(np.array(tokens[: blocks * 16]))

    @rule(
        prompt=PROMPT, blocks=BLOCKS, which=st.integers(0, 1), priority=st.sampled_from([0, 50, 90])
    )
    def save(self, prompt, blocks, which, priority):
        keys = self.keys(which, prompt, blocks)
        asked = [] if priority == 50 else Retention(priority=priority, duration_s=60)
        rig.save(self.engine, keys, self.caches[which], np.arange(blocks), retention=asked)

    @rule(prompt=PROMPT, blocks=BLOCKS, keep=st.booleans())
    def match(self, prompt, blocks, keep):
        match = self.engine.match_pools([self.keys(which, prompt, blocks) for which in (0, 1)])
        held = [self.engine.contains(self.keys(which, prompt, blocks)) for which in (0, 1)]
        assert match.tokens == longest(held, [FULL, WINDOW])
        if keep:
            self.matches.append(match)
        else:
            match.release()

    @rule()
    def release(self):
        if self.matches:
            self.matches.pop().release()

    @rule(prompt=PROMPT, blocks=BLOCKS)
    def pin(self, prompt, blocks):
        keys = self.keys(0, prompt, blocks)
        count = self.engine.pin(keys, hard=True)
        self.pinned |= {(at, keys.key(at)): None for at in range(count)}

    @rule(prompt=PROMPT)
    def unpin(self, prompt):
        keys = self.keys(0, prompt, DEPTH)
        self.engine.unpin(keys)
        for at in range(DEPTH):
            self.pinned.pop((at, keys.key(at)), None)

    @rule(prompt=PROMPT, which=st.integers(0, 1), branch=st.booleans())
    def hint(self, prompt, which, branch):
        how = {"branch_done": True} if branch else {"expect_resume_in": 30.0}
        self.engine.hint(self.keys(which, prompt, DEPTH), **how)

    @rule(share=st.sampled_from([0.0, 0.3, 0.8]))
    def press(self, share):
        self.engine.squeeze(int(share * (1 << 19)))

    @invariant()
    def all_holds(self):
        stats = self.engine.stats()
        assert stats["memory_bytes"] <= 1 << 19
        for prompt in range(PROMPTS):
            held = self.engine.contains(self.keys(0, prompt, DEPTH))
            assert held[: int(held.sum())].all(), "a child without its parent"
        for match in self.matches:
            for lease in (lease for leases in match.leases for lease in leases):
                assert self.engine.contains(lease.keys[: lease.blocks]).all(), "leased, and gone"
        for at, key in self.pinned:
            keys = next(k for p in range(PROMPTS) if (k := self.keys(0, p, DEPTH)).key(at) == key)
            assert self.engine.contains(keys)[at], "pinned, and gone"

    def teardown(self):
        for match in self.matches:
            match.release()
        for prompt in range(PROMPTS):
            self.engine.unpin(self.keys(0, prompt, DEPTH))
        self.engine.squeeze(0)
        assert self.engine.stats()["memory_blocks"] == 0
        self.engine.check()
        self.engine.close()


@pytest.mark.leaks("engines of failed examples are not closed")
def test_pools_against_all_that_is_asked():
    run_state_machine_as_test(
        TwoPools, settings=settings(max_examples=12, stateful_step_count=25, deadline=None)
    )


def test_a_daemon_matches_pools_too(tmp_path):
    daemon = Daemon(tmp_path, "mem://?size=8M")
    try:
        with kvengine.open(daemon.url) as engine:
            tables, caches = saved(engine, (FULL, WINDOW, STATE))
            assert engine.drop(tables[1][1:10]) == 9
            with engine.match_pools(tables) as match:
                assert match.tokens == 192
                check_right(engine, match, tables, caches)
            assert engine.drop(tables[1][11:]) == 1
            assert engine.match_pools(tables).tokens == 16
    finally:
        assert daemon.stop() == 0
