"""Memory and tiers below it, played on a trace with a model's costs: what is saved, in seconds.

As the engine does it: what is computed goes to memory and to every tier that pays, a prompt's
leading blocks are found in memory and then in the fastest tier that has them, and `kvengine.plan`,
which knows what it has measured so far, says which of them are fetched. Tiers evict by LRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvengine.costs import CALL_S, PLACES, Model, Place
from kvengine.errors import TraceError
from kvengine.plan import MEMORY, Costs
from kvengine.policy import Entries, Policy, Request
from kvengine.policy.lru import LRU
from kvengine.shadow import Shadow
from kvengine.trace import Trace

NOWHERE = -2
PROGRESS_EVERY = 256  # requests


@dataclass(frozen=True, slots=True)
class Below:
    """A tier: where it is, and room for how many blocks."""

    place: Place
    blocks: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the scored requests. Seconds: of computing all of it, and those saved."""

    accesses: int
    memory_hits: int
    tier_hits: tuple[int, ...]
    fetched: int
    prefill_s: float
    saved_s: float

    @property
    def hit_ratio(self) -> float:
        """Return hits anywhere over accesses."""
        return (self.memory_hits + sum(self.tier_hits)) / self.accesses if self.accesses else 0.0

    @property
    def saved_share(self) -> float:
        """Return the share of the seconds of computing that was saved."""
        return self.saved_s / self.prefill_s if self.prefill_s else 0.0


def play(
    trace: Trace,
    policy: Policy,
    blocks: int,
    below: Sequence[Below],
    model: Model,
    score_from: int = 0,
    *,
    plans: bool = True,
    split: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Play a trace with room for so many blocks in memory.

    plans False: fetch whatever is held; split: compute the head of a prompt while its tail is
    fetched, where that is sooner.

    `progress` is told how many requests are done. Raises TraceError for no room.
    """
    if blocks < 1 or any(each.blocks < 1 for each in below):
        raise TraceError("capacity: expected room for at least one block in memory and each tier")
    node = _Node(trace, policy, blocks, below, model, plans, split)
    total = _Total(len(below))
    for request in range(trace.requests):
        node.request(request, total if request >= score_from else _Total(len(below)))
        if progress is not None and request % PROGRESS_EVERY == 0:
            progress(request)
    return Outcome(
        int(trace.offsets[-1] - trace.offsets[score_from]), total.memory, tuple(total.tiers),
        total.fetched, total.prefill_s, total.saved_s,
    )  # fmt: skip


class _Total:
    def __init__(self, tiers: int) -> None:
        self.memory = self.fetched = 0
        self.tiers = [0] * tiers
        self.prefill_s = self.saved_s = 0.0


class _Node:
    """One engine's books: memory, tiers, what was measured."""

    def __init__(
        self,
        trace: Trace,
        policy: Policy,
        blocks: int,
        below: Sequence[Below],
        model: Model,
        plans: bool,
        split: bool,
    ) -> None:
        self._split = split
        self._trace = trace
        self._model = model
        self._who = (model.name, b"")
        self._plans = plans
        self._memory = Shadow(policy, blocks, trace.unique)
        self._tiers = [Shadow(LRU(), each.blocks, trace.unique) for each in below]
        self._places = {MEMORY: PLACES["dram"], **{n: b.place for n, b in enumerate(below)}}
        self._costs = Costs()
        self._block_bytes = model.token_bytes * trace.block_tokens

    def request(self, number: int, total: _Total) -> None:
        """Look up, fetch what is worth it, compute the rest, keep all of it."""
        trace, tokens = self._trace, self._trace.block_tokens
        path, now = trace.path(number), float(trace.seconds[number])
        prints = trace.prints[path]
        about = Request(int(trace.output_tokens[number]), int(trace.stops[number]), tokens)
        count = self._memory.look(path, prints, about, now, _ignore)
        homes = self._homes(path, count)
        first, stop = 0, len(homes)
        if self._plans and stop:
            sizes = np.full(stop, self._block_bytes, dtype=np.int64)
            plan = self._costs.plan(self._who, homes, sizes, tokens, 0, self._split)
            first, stop = plan.first, plan.stop
        taken = self._fetch(homes[first:stop])
        head = 0.0
        if first:
            head = self._model.seconds(0, first * tokens) + CALL_S
            self._costs.computed(self._who, 0, first * tokens, head)
        if stop < len(path):
            spent = self._model.seconds(stop * tokens, len(path) * tokens) + CALL_S
            self._costs.computed(self._who, stop * tokens, (len(path) - stop) * tokens, spent)
        total.memory += count
        for tier in range(len(self._tiers)):
            total.tiers[tier] += int((homes == tier).sum())
        total.fetched += stop - first
        total.prefill_s += self._model.seconds(0, len(path) * tokens)
        total.saved_s += self._model.seconds(0, stop * tokens) - max(head, taken)
        self._memory.put(path[:count], path[count:], prints[count:], count, about, now, _ignore)
        self._keep(path, prints, about, now)

    def _homes(self, path: Entries, count: int) -> NDArray[np.int32]:
        """Return where each leading block would be read from."""
        homes = np.full(len(path), NOWHERE, dtype=np.int32)
        for number in range(len(self._tiers) - 1, -1, -1):
            homes[self._tiers[number].holds(path)] = number
        homes[:count] = MEMORY
        away = homes == NOWHERE
        return homes[: int(away.argmax())] if away.any() else homes

    def _fetch(self, homes: NDArray[np.int32]) -> float:
        """Return how long it takes; tiers are read at the same time, and measured."""
        slowest = 0.0
        for tier in set(homes.tolist()):
            nbytes = int((homes == tier).sum()) * self._block_bytes
            seconds = self._places[tier].seconds(nbytes)
            self._costs.fetched(tier, nbytes, seconds)
            slowest = max(slowest, seconds)
        return slowest

    def _keep(self, path: Entries, prints: NDArray[np.int64], about: Request, now: float) -> None:
        """Write what a tier does not have to it, where a prompt would be fetched from there."""
        for number, tier in enumerate(self._tiers):
            held = tier.look(path, prints, about, now, _ignore)
            about_blocks = (self._block_bytes, self._trace.block_tokens)
            if not self._plans or self._costs.pays(self._who, number, *about_blocks):
                tier.put(path[:held], path[held:], prints[held:], held, about, now, _ignore)


def _ignore(entries: Entries) -> None:
    """What leaves memory is in the tiers already."""
