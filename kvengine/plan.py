"""Compute or load: which blocks of a prompt to fetch, which to compute again, which tier to write.

Tokens a..b of a prompt take `weight * (b - a) + attention * (b**2 - a**2) / 2` seconds of prefill,
and `overhead` a call; a table of n bytes takes `latency + n / bandwidth` seconds from a tier. Both
are fitted to what was measured, old measurements fading. A block at a late position is dearer to
compute than one at an early one and no dearer to fetch, so what pays is a matter of position, tier
and model: a fetch of the tail may pay while the head is computed meanwhile.

Nothing here reads a clock or does I/O: the engine tells `Costs` what things took, and asks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvengine.errors import ConfigError

Floats = NDArray[np.float64]
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Model = tuple[str, bytes]  # its name and the digest of its layout

MEMORY = -1  # the home of blocks that are in the arena
FADE = 0.98  # of the weight of what was measured, by each measurement after it
OUTLIER = 4.0  # a measurement counts at most as so many times what was expected
MEASURED_MIN = 4  # measurements before anything is decided by them
EXPLORE_EVERY = 64  # of so many prompts that were not fetched, one is, to measure again
MODELS_MAX = 256
UNIT_TOKENS, UNIT_BYTES = 1e3, 1e6  # scales that keep the equations well conditioned
SPLIT_GAIN = 0.8  # a head is computed where that takes less than this of the time to fetch it all
GAIN = 0.98  # another term is believed in where it leaves less than this of the error


class Fit:
    """Seconds as a sum of terms that are not negative: least squares of the relative error.

    A term more is taken in only where it explains clearly more, the first ones first.
    """

    def __init__(self, terms: int) -> None:
        self.count = 0
        self._gram = np.zeros((terms, terms))
        self._moment = np.zeros(terms)
        self._square = 0.0
        self._found: Floats | None = None
        self._subsets = [
            list(chosen)
            for size in range(1, terms + 1)
            for chosen in combinations(range(terms), size)
        ]

    def add(self, terms: Sequence[float], seconds: float) -> None:
        """Take in one measurement; one far from what was expected counts as less far."""
        row = np.array(terms)
        expected = float(row @ self.found) if self.count >= MEASURED_MIN else 0.0
        if expected > 0:
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        scale = 1 / (expected or seconds)
        self._gram = FADE * self._gram + scale**2 * np.outer(row, row)
        self._moment = FADE * self._moment + scale**2 * seconds * row
        self._square = FADE * self._square + (scale * seconds) ** 2
        self._found = None
        self.count += 1

    @property
    def found(self) -> Floats:
        """Return the seconds that one unit of each term takes."""
        if self._found is None:
            self._found = self._solve()
        return self._found

    def _solve(self) -> Floats:
        best, least = np.zeros(len(self._moment)), self._square * (1 + 1e-9)
        for chosen in self._subsets:
            gram = self._gram[np.ix_(chosen, chosen)]
            gram = gram + np.diag(1e-9 * np.diag(gram) + 1e-300)
            part = np.linalg.solve(gram, self._moment[chosen])
            left = self._square - float(part @ self._moment[chosen])
            size = int((best > 0).sum())
            if (part >= 0).all() and left < least * (1.0 if len(chosen) == size else GAIN):
                best, least = np.zeros(len(self._moment)), max(left, 0.0)
                best[chosen] = part
        return best


class Prefill:
    """What computing tokens costs, by position. Seconds."""

    def __init__(self) -> None:
        self._fit = Fit(3)

    @property
    def measured(self) -> bool:
        """Whether there is enough to decide by."""
        return self._fit.count >= MEASURED_MIN

    @property
    def overhead_s(self) -> float:
        """Return what a call takes whatever it computes."""
        return float(self._fit.found[2])

    def add(self, position: int, tokens: int, seconds: float) -> None:
        """Take in that `tokens` after `position` others took so long."""
        tokens_k = tokens / UNIT_TOKENS
        middle_k = (position + tokens / 2) / UNIT_TOKENS
        self._fit.add((tokens_k, tokens_k * middle_k, 1.0), seconds)

    def until(self, tokens: Int64s) -> Floats:
        """Return the seconds of computing the first so many tokens of a prompt, without overhead:
        the rest of the prompt is computed in the same call."""
        weight, attention, _ = self._fit.found.tolist()
        tokens_k = tokens / UNIT_TOKENS
        found: Floats = tokens_k * (weight + attention / 2 * tokens_k)
        return found


class Speed:
    """What reading from one tier costs. Seconds."""

    def __init__(self) -> None:
        self._fit = Fit(2)

    @property
    def measured(self) -> bool:
        """Whether there is enough to decide by."""
        return self._fit.count >= MEASURED_MIN

    def add(self, nbytes: int, seconds: float) -> None:
        """Take in that a table of so many bytes took so long."""
        self._fit.add((nbytes / UNIT_BYTES, 1.0), seconds)

    def seconds(self, nbytes: Int64s) -> Floats:
        """Return how long tables of so many bytes take; nothing takes no time."""
        each, latency = self._fit.found.tolist()
        found: Floats = np.where(nbytes > 0, latency + nbytes / UNIT_BYTES * each, 0.0)
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """Blocks first..stop of a lease are worth fetching, those before and after computing.

    `reason`: "unmeasured" (all are fetched, nothing is known), "fetch" (all), "part" (the leading
    ones), "split" (the head is computed while the rest arrives), "recompute" (none), "measure"
    (all, though it may not pay: to measure again). `saved_s`: against computing all of them; 0
    where nothing is known.
    """

    first: int
    stop: int
    reason: str
    saved_s: float = 0.0

    def __len__(self) -> int:
        return self.stop - self.first


def decide(
    prefill: Prefill,
    speeds: Mapping[int, Speed],
    homes: Int32s,
    nbytes: Int64s,
    block_tokens: int,
    position: int = 0,
    *,
    split: bool = False,
) -> Plan:
    """Return which of a prompt's leading blocks to fetch so that all are there soonest.

    homes: the tier of each block, MEMORY or a number of `speeds` (one that is not there, or not
    measured, is taken to cost nothing: so it gets measured); nbytes: of each block's frame;
    position: blocks of the prompt before the first. Tiers are read at the same time. With `split`
    the head may be computed while the tail arrives. O(n), with `split` O(n log n).
    """
    count = len(homes)
    if not prefill.measured:
        return Plan(0, count, "unmeasured")
    compute = prefill.until(block_tokens * (position + np.arange(count + 1)))
    compute = compute - compute[0]
    tiers = []
    for number in sorted(set(homes.tolist())):
        speed = speeds.get(number)
        if speed is not None and speed.measured:
            taken = np.cumsum(np.where(homes == number, nbytes, 0))
            tiers.append((speed, np.concatenate([[0], taken]).astype(np.int64)))

    def fetch(first: Int64s, stop: Int64s) -> Floats:
        slowest = np.zeros(len(stop))
        for speed, taken in tiers:
            slowest = np.maximum(slowest, speed.seconds(taken[stop] - taken[first]))
        return slowest

    stops = np.arange(count + 1)
    nothing = np.zeros(count + 1, dtype=np.int64)
    after = compute[-1] - compute
    totals = fetch(nothing, stops) + after
    stop = count - int(totals[::-1].argmin())  # of equal ones the most blocks
    first, total = 0, float(totals[stop])
    if split and count:
        # The more of the head is computed, the longer that takes, and the less there is to fetch:
        # for each stop the best is where the two meet.
        low, high = nothing, stops.copy()
        while (low < high).any():
            middle = (low + high) // 2
            enough = compute[middle] + prefill.overhead_s >= fetch(middle, stops)
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        limit = SPLIT_GAIN * total  # costs are estimates, and a call more is a risk
        for firsts in (low, np.maximum(low - 1, 0)):
            head = np.where(firsts > 0, compute[firsts] + prefill.overhead_s, 0.0)
            totals = np.maximum(head, fetch(firsts, stops)) + after
            best = count - int(totals[::-1].argmin())
            if totals[best] < min(total, limit) and 0 < firsts[best] < best:
                first, stop, total = int(firsts[best]), best, float(totals[best])
    saved = float(compute[-1]) - total
    if not stop or saved <= 0:
        return Plan(0, 0, "recompute")
    reason = "split" if first else "fetch" if stop == count else "part"
    return Plan(first, stop, reason, saved)


def worth(
    prefill: Prefill,
    speed: Speed | None,
    block_bytes: int,
    block_tokens: int,
    blocks: int,
    reuse: float = 1.0,
    *,
    split: bool = False,
) -> float:
    """Return the seconds saved for a byte in a tier by prompts of up to so many blocks; 0: never.

    `reuse` is the probability that a block is asked for again before it would leave. A block goes
    to the tiers where this is above what their room is worth; nothing to those of 0. Where nothing
    was measured yet, any tier is worth it: infinity.
    """
    if speed is None or not speed.measured or not prefill.measured:
        return float("inf")
    # The gain of a prompt of n blocks is convex in n: best is the longest, or it is none at all.
    homes = np.zeros(blocks, dtype=np.int32)
    sizes = np.full(blocks, block_bytes, dtype=np.int64)
    plan = decide(prefill, {0: speed}, homes, sizes, block_tokens, split=split)
    return reuse * plan.saved_s / (block_bytes * len(plan)) if len(plan) else 0.0


class Costs:
    """What was measured so far in one engine. Any thread may call any verb.

    Prefill is measured by model, fetches by tier.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prefills: dict[Model, Prefill] = {}
        self._longest: dict[Model, int] = {}
        self._speeds: dict[int, Speed] = {}
        self._paying: dict[tuple[Model, int, int], bool] = {}
        self._refused = self._asked = 0

    @property
    def active(self) -> bool:
        """Whether there is a model whose computing was measured at all."""
        return bool(self._prefills)

    def computed(self, model: Model, position: int, tokens: int, seconds: float) -> None:
        """Take in that a model computed `tokens` after `position` others in so long."""
        with self._lock:
            prefill = self._prefills.pop(model, None) or Prefill()
            prefill.add(position, tokens, seconds)
            self._prefills[model] = prefill  # the one measured last stands last
            self._longest[model] = max(position + tokens, self._longest.get(model, 0))
            if len(self._prefills) > MODELS_MAX:
                oldest = next(iter(self._prefills))
                del self._prefills[oldest], self._longest[oldest]

    def fetched(self, tier: int, nbytes: int, seconds: float) -> None:
        """Take in that a table of so many bytes came from a tier (or MEMORY) in so long."""
        if nbytes > 0 and seconds > 0:
            with self._lock:
                self._speeds.setdefault(tier, Speed()).add(nbytes, seconds)

    def plan(
        self,
        model: Model,
        homes: Int32s,
        nbytes: Int64s,
        block_tokens: int,
        position: int,
        split: bool,
    ) -> Plan:
        """Decide as `decide`; now and then fetch what does not pay, to measure it again."""
        with self._lock:
            prefill = self._prefills.get(model)
            if prefill is None:
                return Plan(0, len(homes), "unmeasured")
            speeds = self._speeds
            plan = decide(prefill, speeds, homes, nbytes, block_tokens, position, split=split)
            if plan.reason == "recompute" and len(homes):
                self._refused += 1
                if self._refused % EXPLORE_EVERY == 0:
                    return Plan(0, len(homes), "measure")
            return plan

    def pays(self, model: Model, tier: int, block_bytes: int, tokens: int) -> bool:
        """Say whether a prompt as long as the longest yet would be fetched from a tier.

        tokens: of a block. Worked out anew after so many were asked; True then, so that what was
        found too slow is measured again.
        """
        with self._lock:
            self._asked += 1
            if self._asked % EXPLORE_EVERY == 0:
                self._paying.clear()
                return True
            prefill, speed = self._prefills.get(model), self._speeds.get(tier)
            if not (prefill and prefill.measured and speed and speed.measured):
                return True
            about = (model, tier, block_bytes)
            if about not in self._paying:
                blocks = max(1, self._longest[model] // tokens)
                self._paying[about] = worth(prefill, speed, block_bytes, tokens, blocks) > 0
            return self._paying[about]

    def prefill_s(self, model: Model, tokens: Int64s) -> Floats | None:
        """Return what computing the first so many tokens takes; None where that is not known."""
        with self._lock:
            prefill = self._prefills.get(model)
            return prefill.until(tokens) if prefill is not None and prefill.measured else None


def check_prefill(position: int, tokens: int, seconds: float) -> None:
    """Raise ConfigError for what no computing can have taken. See `Engine.observe_prefill`."""
    if not (position >= 0 and tokens > 0 and 0 < seconds < 1e6):
        raise ConfigError(
            f"observe_prefill: given {tokens} tokens after {position} in {seconds} s, expected "
            "at least one token and a time above 0"
        )
