"""Compute or load: what is measured is found again, and the plan is the best there is."""

import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvengine
import rig
from kvengine.errors import ConfigError
from kvengine.plan import (
    EXPLORE_EVERY,
    MEASURED_MIN,
    MEMORY,
    SPLIT_GAIN,
    Costs,
    Plan,
    Prefill,
    Speed,
    decide,
    worth,
)

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 16
MODEL = ("m", b"layout")


def prefill(weight: float = 1e-5, attention: float = 1e-9, overhead: float = 0.0) -> Prefill:
    """Seconds a token, more of them a position, and a call."""
    made = Prefill()
    for position, tokens in [(0, 64), (0, 512), (4096, 64), (30_000, 2048), (9, 9000)] * 4:
        seconds = weight * tokens + attention * tokens * (position + tokens / 2) + overhead
        made.add(position, tokens, seconds)
    return made


def speed(latency: float, bandwidth: float) -> Speed:
    made = Speed()
    for nbytes in (1 << 12, 1 << 20, 1 << 24, 1 << 28) * 4:
        made.add(nbytes, latency + nbytes / bandwidth)
    return made


@pytest.mark.parametrize("weight", [1e-6, 1e-4])
@pytest.mark.parametrize("attention", [0.0, 1e-9, 1e-8])
@pytest.mark.parametrize("overhead", [0.0, 5e-3])
def test_the_cost_of_a_prefill_is_found(weight, attention, overhead):
    found = prefill(weight, attention, overhead)
    for tokens in (512, 30_000, 130_000):
        expected = weight * tokens + attention * tokens**2 / 2
        assert float(found.until(np.array([tokens]))[0]) == pytest.approx(expected, rel=0.02)
    assert found.overhead_s == pytest.approx(overhead, abs=2e-4)


@pytest.mark.parametrize("latency", [0.0, 1e-4, 0.03])
@pytest.mark.parametrize("bandwidth", [1e9, 50e9])
def test_the_speed_of_a_tier_is_found(latency, bandwidth):
    found = speed(latency, bandwidth)
    for nbytes in (1 << 20, 1 << 30):
        expected = latency + nbytes / bandwidth
        assert float(found.seconds(np.array([nbytes]))[0]) == pytest.approx(expected, rel=0.02)
    assert float(found.seconds(np.array([0]))[0]) == 0


def test_an_outlier_moves_little_and_a_change_is_followed():
    found, size = speed(1e-4, 1e9), np.array([1 << 24])
    before = float(found.seconds(size)[0])
    found.add(1 << 24, 1000 * before)
    assert float(found.seconds(size)[0]) < 1.5 * before
    for _ in range(150):
        found.add(1 << 24, 10 * before)
    assert float(found.seconds(size)[0]) == pytest.approx(10 * before, rel=0.3)


def total(plan: Plan, cost: Prefill, speeds, homes, nbytes, position: int) -> float:
    """The seconds until all blocks are there, said plainly."""
    edge = cost.until(TOKENS * (position + np.arange(len(homes) + 1)))
    fetch = 0.0
    for home in set(homes.tolist()):
        chosen = homes[plan.first : plan.stop] == home
        size = int(nbytes[plan.first : plan.stop][chosen].sum())
        if home in speeds:
            fetch = max(fetch, float(speeds[home].seconds(np.array([size]))[0]))
    head = float(edge[plan.first] - edge[0]) + (cost.overhead_s if plan.first else 0.0)
    return max(head, fetch) + float(edge[-1] - edge[plan.stop])


COSTS = prefill(2e-5, 4e-9, 2e-4)
SPEEDS = {MEMORY: speed(1e-5, 4e9), 0: speed(1e-4, 4e8), 1: speed(5e-3, 1e8)}


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.sampled_from([MEMORY, 0, 1, 2]), st.integers(1, 1 << 17))),
    position=st.integers(0, 4000),
    split=st.booleans(),
)
def test_no_plan_is_better(blocks, position, split):
    homes = np.array([home for home, _ in blocks], np.int32)
    nbytes = np.array([size for _, size in blocks], np.int64)
    found = decide(COSTS, SPEEDS, homes, nbytes, TOKENS, position, split=split)
    count = len(blocks)

    def seconds(first: int, stop: int) -> float:
        return total(Plan(first, stop, ""), COSTS, SPEEDS, homes, nbytes, position)

    took = seconds(found.first, found.stop)
    prefix = min(seconds(0, stop) for stop in range(count + 1))
    splits = [seconds(f, s) for s in range(count + 1) for f in range(1, s)] if split else []
    best = min([prefix, *(each for each in splits if each < SPLIT_GAIN * prefix)])
    assert took == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert found.saved_s == pytest.approx(max(0.0, seconds(0, 0) - took), rel=1e-6, abs=1e-9)
    assert found.saved_s >= 0 and 0 <= found.first <= found.stop <= count


def test_reasons():
    homes, sizes = np.zeros(40, np.int32), np.full(40, 1 << 20, np.int64)

    def reason(latency: float, bandwidth: float, split: bool = False) -> str:
        speeds = {0: speed(latency, bandwidth)}
        return decide(prefill(), speeds, homes, sizes, TOKENS, split=split).reason

    assert reason(0.0, 1e12) == "fetch"
    assert reason(0.0, 1e8) == "recompute"
    assert reason(0.0, 10e9, split=True) == "split"
    assert decide(Prefill(), {}, homes, sizes, TOKENS) == Plan(0, 40, "unmeasured")
    assert decide(prefill(), {}, homes, sizes, TOKENS).reason == "fetch"  # to be measured
    mixed = np.array([0] * 20 + [1] * 20, np.int32)
    slow = {0: speed(0, 1e12), 1: speed(1.0, 1e9)}
    found = decide(prefill(), slow, mixed, sizes, TOKENS)
    assert found.reason == "part" and (found.first, found.stop) == (0, 20)


def test_a_tier_is_worth_writing_where_a_long_prompt_is_fetched():
    cost, slow = prefill(1e-5, 1e-8), speed(0.03, 1e9)
    assert worth(cost, slow, 1 << 20, TOKENS, 8) == 0
    assert worth(cost, slow, 1 << 20, TOKENS, 16_000) > 0
    half = worth(cost, slow, 1 << 20, TOKENS, 16_000, 0.5)
    assert half == pytest.approx(worth(cost, slow, 1 << 20, TOKENS, 16_000) / 2)
    assert worth(cost, slow, 1 << 20, TOKENS, 16_000, 0.0) == 0
    assert math.isinf(worth(cost, None, 1 << 20, TOKENS, 8))
    assert math.isinf(worth(Prefill(), slow, 1 << 20, TOKENS, 8))


def test_what_does_not_pay_is_measured_again():
    costs, homes, sizes = Costs(), np.zeros(4, np.int32), np.full(4, 1 << 20, np.int64)
    assert costs.plan(MODEL, homes, sizes, TOKENS, 0, False).reason == "unmeasured"
    assert costs.pays(MODEL, 0, 1 << 20, TOKENS)
    for _ in range(MEASURED_MIN):
        costs.computed(MODEL, 0, 64, 1e-4)
        costs.fetched(0, 1 << 20, 1.0)
    plans = [costs.plan(MODEL, homes, sizes, TOKENS, 0, False) for _ in range(2 * EXPLORE_EVERY)]
    assert [plan.reason for plan in plans].count("measure") == 2
    assert plans[0] == Plan(0, 0, "recompute")
    assert not costs.pays(MODEL, 0, 1 << 20, TOKENS)
    assert costs.plan(("other", b""), homes, sizes, TOKENS, 0, False).reason == "unmeasured"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench.plan, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.plan

    return bench.plan


def test_planning_saves_no_less_than_always_fetching(bench):
    requests, better = bench.sessions(200, seed=1), 0
    for model in bench.MODELS.values():
        for place in bench.PLACES.values():
            ours, theirs = (
                bench.play(requests, model, place, plans=plans, seed=1).saved_s
                for plans in (True, False)
            )
            assert ours >= theirs, (model.name, place.name)
            better += ours > theirs
    assert better >= 9


def loaded(engine, names, tokens, split: bool = False) -> range:
    """Match a prompt, load what is worth it, and say what was."""
    keys = names.keys(tokens)
    with engine.match(keys, split=split) as lease:
        worth = lease.worth
        target = rig.caches(names.layout, len(keys))
        table = np.arange(len(worth))
        assert engine.load(lease, target, table, first=worth.start).wait(rig.WAIT_S)
    return worth


def test_an_engine_that_measures_computes_what_is_slower_to_fetch(tmp_path):
    of = rig.layout()
    with kvengine.open(f"mem://?size=16M | file://{tmp_path}?size=64M") as engine:
        names = rig.names(engine, of)
        tokens = rig.prompt(8, of)
        rig.save(engine, names.keys(tokens), rig.caches(of, 8, seed=1))
        assert loaded(engine, names, tokens) == range(8)
        assert engine.metrics.get("plan_decisions") == 0  # nothing is known: as ever
        for _ in range(2 * MEASURED_MIN):  # an hour a token
            engine.observe_prefill(names, 0, 16, 3600.0)
            assert loaded(engine, names, tokens) == range(8)
        assert engine.metrics.get("plan_decisions", reason="fetch") > 0
        assert engine.metrics.get("saved_prefill_seconds") > 3600
        for _ in range(300):  # a nanosecond
            engine.observe_prefill(names, 0, 1 << 20, 1e-9)
        saved = engine.metrics.get("saved_prefill_seconds")
        assert loaded(engine, names, tokens) == range(0)
        assert engine.metrics.get("plan_decisions", reason="recompute") == 1
        assert engine.metrics.get("saved_prefill_seconds") == saved
        assert engine.probe(names.keys(tokens)) == 8

        # The disk is measured, too slow, and not written to from then on.
        assert engine.flush(rig.WAIT_S)
        for _ in range(MEASURED_MIN):
            engine.squeeze(0)
            with engine.match(names.keys(tokens)) as lease:
                target = rig.caches(of, 8)
                assert engine.load(lease, target, np.arange(8)).wait(rig.WAIT_S)
        more = names.keys(rig.prompt(8, of, seed=2))
        rig.save(engine, more, rig.caches(of, 8, seed=2))
        assert engine.flush(rig.WAIT_S)
        assert engine.metrics.get("write_skipped_blocks", tier="disk") == 8
        engine.check()


@pytest.mark.parametrize(
    ("position", "tokens", "seconds"), [(-1, 1, 1.0), (0, 0, 1.0), (0, 1, 0.0), (0, 1, math.nan)]
)
def test_a_prefill_that_cannot_be_is_refused(position, tokens, seconds):
    with kvengine.open("mem://?size=16M") as engine:
        with pytest.raises(ConfigError, match="expected at least one token"):
            engine.observe_prefill(rig.names(engine, rig.layout()), position, tokens, seconds)
