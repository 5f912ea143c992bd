"""Compute or load against a cache that always fetches: prefill seconds saved, by model and tier.

Requests play against one tier below the GPU that holds a tenth of the unique blocks by LRU, leaves
first. Theirs writes every block and fetches every hit. Ours asks `kvengine.plan`, which knows only
what it has measured so far: each duration is drawn around the truth (lognormal, a spread of 10 %
for compute and 30 % for fetches, one fetch in fifty takes ten times as long), the same for both. A
prefill takes 2 * active + attention * position operations a token at 450 TFLOP/s, and 5 ms a call.
A row matches where ours saves at least as much as theirs.

The requests are sessions of a chat: Pareto lengths, think times, shared prompts. With `--trace
FILE` those of a trace play besides, with exact durations, memory for 2 % of the unique blocks and
the tier for a quarter of them (`kvengine.tiered`); the last 40 % count.
"""

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.runner import Row
from kvengine import tiered
from kvengine.costs import CALL_S, MODELS, PLACES, Model, Place
from kvengine.formats import read
from kvengine.plan import Costs
from kvengine.policy.lru import LRU

BLOCK_TOKENS = 512
CAPACITY = 0.1


class Outcome(NamedTuple):
    """Seconds of prefill saved; how many requests were fetched for in part or not at all."""

    saved_s: float
    split: int
    refused: int


def run(options: argparse.Namespace) -> list[Row]:
    """Play every model and tier, theirs and ours."""
    requests = sessions(options.requests, options.seed)
    rows: list[Row] = traced(options.trace) if options.trace else []
    for model in MODELS.values():
        for place in PLACES.values():
            theirs = play(requests, model, place, plans=False, seed=options.seed)
            ours = play(requests, model, place, plans=True, seed=options.seed)
            case = f"{model.name} / {place.name}"
            good = ours.saved_s >= theirs.saved_s
            ratio = ours.saved_s / theirs.saved_s if theirs.saved_s > 0 else None
            shared = {"bench": "plan", "case": case, "metric": "saved_prefill", "unit": "s"}
            rows.append(
                Row(
                    **shared,
                    value=ours.saved_s,
                    bound=theirs.saved_s,
                    ratio=ratio,
                    n=len(requests),
                    matches_reference=good,
                )  # fmt: skip
            )
            rows.append(Row(**shared, system="always fetch", value=theirs.saved_s, n=len(requests)))
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--requests` and `--seed` to the command line."""
    parser.add_argument("--requests", type=int, default=1500, help="how many (default 1500)")
    parser.add_argument("--trace", type=Path, help="a trace that is played besides")
    parser.add_argument("--seed", type=int, default=0, help="of sessions and noise (default 0)")


def traced(path: Path) -> list[Row]:
    """Play a trace on memory and every tier, theirs and ours."""
    trace = read(path)
    scored, rows = int(0.6 * trace.requests), []
    memory, below = max(1, trace.unique // 50), max(1, trace.unique // 4)
    for model in MODELS.values():
        for place in PLACES.values():
            theirs, ours = (
                tiered.play(
                    trace,
                    LRU(),
                    memory,
                    [tiered.Below(place, below)],
                    model,
                    scored,
                    plans=plans,
                    split=plans,
                )  # fmt: skip
                for plans in (False, True)
            )
            shared = {"bench": "plan", "case": f"{trace.name} {model.name} / {place.name}"}
            shared |= {"metric": "saved_prefill", "unit": "s", "n": trace.requests}
            rows += [
                Row(
                    **shared,
                    value=ours.saved_s,
                    bound=theirs.saved_s,
                    ratio=ours.saved_s / theirs.saved_s if theirs.saved_s > 0 else None,
                    matches_reference=ours.saved_s >= theirs.saved_s,
                ),
                Row(**shared, system="always fetch", value=theirs.saved_s),
            ]
    return rows


def sessions(count: int, seed: int) -> list[list[int]]:
    """Draw requests of chats that take turns, in order of time: the paths of their blocks."""
    draw = np.random.default_rng(seed)
    prompts = [
        [-1 - 100 * which - at for at in range(size)] for which, size in enumerate((2, 4, 8))
    ]
    events, fresh = [], 0
    while len(events) < count:
        start = float(draw.uniform(0, 1000))
        path = list(prompts[int(draw.integers(3))])
        for _ in range(int(draw.geometric(0.25))):
            size = 1 + int(min(120, draw.pareto(1.1) * 4))
            path = [*path, *range(fresh, fresh + size)]
            fresh += size
            events.append((start, path))
            start += float(draw.exponential(30))
    events.sort(key=lambda event: event[0])
    return [path for _, path in events[:count]]


def play(
    requests: Sequence[Sequence[int]], model: Model, place: Place, *, plans: bool, seed: int
) -> Outcome:
    """Play requests against one tier; the durations of request r are the same for every caller."""
    held: OrderedDict[int, None] = OrderedDict()  # the least recently used block is first
    capacity = int(CAPACITY * len({block for path in requests for block in path}))
    draw = np.random.default_rng(seed)
    compute_noise = draw.lognormal(0, 0.1, len(requests))
    fetch_noise = draw.lognormal(0, 0.3, len(requests))
    fetch_noise[draw.random(len(requests)) < 0.02] *= 10
    costs, who = Costs(), (model.name, b"")
    block_bytes = model.token_bytes * BLOCK_TOKENS
    saved, split, refused = 0.0, 0, 0
    for r, path in enumerate(requests):
        hit = 0
        while hit < len(path) and path[hit] in held:
            hit += 1
        first, stop = 0, hit
        if plans and hit:
            homes, sizes = np.zeros(hit, np.int32), np.full(hit, block_bytes, np.int64)
            plan = costs.plan(who, homes, sizes, BLOCK_TOKENS, 0, True)
            first, stop = plan.first, plan.stop
            split += first > 0
            refused += plan.reason == "recompute"
        head_s, fetch_s = 0.0, 0.0
        if first:
            head_s = (model.seconds(0, first * BLOCK_TOKENS) + CALL_S) * compute_noise[r]
            costs.computed(who, 0, first * BLOCK_TOKENS, head_s)
        if stop > first:
            nbytes = (stop - first) * block_bytes
            fetch_s = (place.latency_s + nbytes / place.bandwidth) * fetch_noise[r]
            costs.fetched(0, nbytes, fetch_s)
        hit_s = model.seconds(0, hit * BLOCK_TOKENS) * compute_noise[r]
        rest_s = model.seconds(stop * BLOCK_TOKENS, hit * BLOCK_TOKENS) * compute_noise[r]
        saved += hit_s - max(head_s, fetch_s) - rest_s
        if tokens := (len(path) - stop) * BLOCK_TOKENS:
            took = model.seconds(stop * BLOCK_TOKENS, len(path) * BLOCK_TOKENS) + CALL_S
            costs.computed(who, stop * BLOCK_TOKENS, tokens, took * compute_noise[r])
        if not plans or costs.pays(who, 0, block_bytes, BLOCK_TOKENS):
            _keep(held, path, capacity)
    return Outcome(float(saved), split, refused)


def _keep(held: OrderedDict[int, None], path: Sequence[int], capacity: int) -> None:
    for block in reversed(path):
        held[block] = None
        held.move_to_end(block)
    while len(held) > capacity:
        held.popitem(last=False)
