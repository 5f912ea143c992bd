"""Memory and tiers on a trace: what is found where, and the seconds that it saves."""

import numpy as np
import pytest

from kvengine.costs import MODELS, PLACES
from kvengine.errors import TraceError
from kvengine.policy.lru import LRU
from kvengine.policy.named import POLICIES
from kvengine.tiered import Below, play
from kvengine.trace import simulate
from test_trace import drawn

TRACE = drawn(400, 6)
MODEL = MODELS["llama-3-70b"]
ALL = TRACE.unique


def seconds(request: int, blocks: int) -> float:
    return MODEL.seconds(0, blocks * TRACE.block_tokens)


def test_memory_alone_hits_what_a_replay_hits():
    blocks = ALL // 8
    for name, make in POLICIES.items():
        expected = simulate(TRACE, make(), blocks, 100, evicted=lambda r, gone: None)
        found = play(TRACE, make(), blocks, [], MODEL, 100)
        assert (found.memory_hits, found.accesses) == (expected.hits, expected.accesses), name
        assert found.tier_hits == () and 0 < found.saved_share < found.hit_ratio


def test_room_for_all_saves_all_that_was_there():
    found = play(TRACE, LRU(), ALL, [], MODEL)
    seen: set[int] = set()
    prefill = saved = 0.0
    for request in range(TRACE.requests):
        path = TRACE.path(request).tolist()
        count = next((at for at, node in enumerate(path) if node not in seen), len(path))
        seen |= set(path)
        prefill += seconds(request, len(path))
        nbytes = count * MODEL.token_bytes * TRACE.block_tokens
        saved += seconds(request, count) - PLACES["dram"].seconds(nbytes)
    assert found.prefill_s == pytest.approx(prefill)
    assert found.saved_s == pytest.approx(saved)
    assert found.memory_hits == found.fetched


def test_tiers_below_are_found_in_turn():
    nvme, s3 = Below(PLACES["nvme"], ALL // 4), Below(PLACES["s3"], ALL)
    alone = play(TRACE, LRU(), ALL // 50, [], MODEL, plans=False)
    one = play(TRACE, LRU(), ALL // 50, [nvme], MODEL, plans=False)
    both = play(TRACE, LRU(), ALL // 50, [nvme, s3], MODEL, plans=False)
    assert alone.memory_hits == one.memory_hits == both.memory_hits
    assert one.tier_hits[0] > 0 and both.tier_hits[1] > 0
    assert alone.hit_ratio < one.hit_ratio < both.hit_ratio
    assert both.memory_hits + sum(both.tier_hits) == len(TRACE.nodes) - ALL == both.fetched


@pytest.mark.parametrize("place", PLACES)
def test_plans_save_no_less_than_always_fetching(place):
    """But for what is fetched in order to measure."""
    better = 0
    for model in MODELS.values():
        below = [Below(PLACES[place], ALL // 2)]
        ours, theirs = (
            play(TRACE, LRU(), ALL // 20, below, model, plans=plans) for plans in (True, False)
        )
        assert ours.saved_s >= theirs.saved_s - 0.01 * abs(theirs.saved_s)
        better += ours.saved_s > theirs.saved_s
    assert better or place in ("dram", "nvme", "25gbe")


def test_a_head_that_is_computed_meanwhile_saves_more():
    below = [Below(PLACES["25gbe"], ALL)]
    found = [play(TRACE, LRU(), 2, below, MODEL, split=split) for split in (False, True)]
    assert found[1].saved_s > found[0].saved_s
    assert found[1].fetched < found[0].fetched and found[1].tier_hits == found[0].tier_hits


def test_no_room_is_said():
    for blocks, below in ((0, []), (5, [Below(PLACES["s3"], 0)])):
        with pytest.raises(TraceError, match="room for at least one block"):
            play(TRACE, LRU(), blocks, below, MODEL)


def test_progress_counts_requests():
    told: list[int] = []
    play(TRACE, LRU(), 10, [], MODEL, progress=told.append)
    assert told == list(np.arange(0, TRACE.requests, 256))
