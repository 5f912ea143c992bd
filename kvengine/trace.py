"""Traces of requests, and what policies make of them.

A trace is a list of requests; a request is a path of blocks from the start of its prompt, each
block standing for itself and all before it. Only full blocks count. A request hits its longest
cached prefix and adds the rest of its prompt; the output is not cached before the next request
carries it. Times do not go back.

    trace = formats.read("conversation_trace.jsonl")
    simulate(trace, LRU(), blocks=4096).hit_ratio
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.errors import TraceError
from kvengine.policy import Entries, Policy, Request
from kvengine.shadow import Shadow

NEVER = (1 << 31) - 1
BLOCKS_MAX = 1 << 30


@dataclass(frozen=True)
class Trace:
    """Requests in order of time. Request r is the path `nodes[offsets[r] : offsets[r + 1]]`.

    nodes: int32 ids 0..unique-1; offsets: int64[requests + 1]; seconds: float64, from any origin;
    output_tokens: int32, -1 unknown; stops: int32 as in `Request`; prints: int64[unique].
    """

    name: str
    block_tokens: int
    nodes: Int32s
    offsets: Int64s
    seconds: NDArray[np.float64]
    output_tokens: Int32s
    stops: Int32s
    prints: Int64s = field(repr=False)

    @property
    def requests(self) -> int:
        """Count the requests."""
        return len(self.seconds)

    @property
    def unique(self) -> int:
        """Count the blocks that a cache without limit would hold in the end."""
        return len(self.prints)

    def coarsened(self, by: int) -> Trace:
        """Join every `by` blocks of a path to one; what is left over at its end is dropped."""
        if by < 1:
            raise TraceError(f"coarsen: given {by}, expected a number of blocks from 1 on")
        counts = np.diff(self.offsets) // by
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        starts = np.repeat(self.offsets[:-1] - offsets[:-1] * by, counts)
        kept = self.nodes[starts + (np.arange(int(offsets[-1])) + 1) * by - 1]
        unique, nodes = np.unique(kept, return_inverse=True)
        return Trace(
            self.name, self.block_tokens * by, nodes.astype(np.int32), offsets, self.seconds,
            self.output_tokens, self.stops, prints_of(len(unique)),
        )  # fmt: skip

    def first(self, count: int) -> Trace:
        """Return the first `count` requests alone."""
        offsets = self.offsets[: count + 1]
        unique, nodes = np.unique(self.nodes[: int(offsets[-1])], return_inverse=True)
        return Trace(
            self.name, self.block_tokens, nodes.astype(np.int32), offsets, self.seconds[:count],
            self.output_tokens[:count], self.stops[:count], prints_of(len(unique)),
        )  # fmt: skip

    def path(self, request: int) -> Int32s:
        """Return the blocks of one request."""
        return self.nodes[self.offsets[request] : self.offsets[request + 1]]


@dataclass(frozen=True)
class Result:
    """What a policy made of a trace: block hits and accesses of the scored part, and the cost."""

    hits: int
    accesses: int
    evictions: int
    took_s: float

    @property
    def hit_ratio(self) -> float:
        """Return hits over accesses."""
        return self.hits / self.accesses if self.accesses else 0.0


@runtime_checkable
class Replayable(Protocol):
    """A policy that plays a whole trace in one compiled loop, with the decisions it would take."""

    def replay(
        self,
        nodes: Int32s,
        offsets: Int64s,
        prints: Int64s,
        seconds: NDArray[np.float64],
        output_tokens: Int32s,
        stops: Int32s,
        block_tokens: int,
        capacity: int,
        score_from: int,
    ) -> tuple[int, int]:
        """Return the hits from request `score_from` on, and the evictions in all."""
        ...


def prints_of(count: int) -> Int64s:
    """Draw what stands for the first bytes of the blocks' keys: splitmix64 of 1, 2, …"""
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)


# Replaying

Evicted = Callable[[int, Entries], None]


def simulate(
    trace: Trace,
    policy: Policy,
    blocks: int,
    score_from: int = 0,
    evicted: Evicted | None = None,
) -> Result:
    """Play a trace against a policy with room for so many blocks.

    Hits count from request `score_from` on. `evicted(request, blocks)` is told each decision; a
    policy that has a compiled loop of its own then plays verb by verb as well.
    """
    _check_capacity(trace, blocks)
    accesses = int(trace.offsets[-1] - trace.offsets[score_from])
    start = time.perf_counter()
    if evicted is None and isinstance(policy, Replayable):
        hits, evictions = policy.replay(
            trace.nodes, trace.offsets, trace.prints, trace.seconds, trace.output_tokens,
            trace.stops, trace.block_tokens, blocks, score_from,
        )  # fmt: skip
    else:
        hits, evictions = _play(trace, policy, blocks, score_from, evicted)
    return Result(hits, accesses, evictions, time.perf_counter() - start)


def _check_capacity(trace: Trace, blocks: int) -> None:
    if not 1 <= blocks <= BLOCKS_MAX:
        raise TraceError(
            f"capacity: given {blocks} blocks, expected 1 to {BLOCKS_MAX} "
            f"({trace.name} has {trace.unique} unique blocks)"
        )


def _play(
    trace: Trace, policy: Policy, blocks: int, score_from: int, evicted: Evicted | None
) -> tuple[int, int]:
    """Call the verbs in the order in which a store does for match, release, reserve, commit."""
    shadow = Shadow(policy, blocks, trace.unique)
    hits = evictions = 0

    def gone(request: int, entries: Entries) -> None:
        nonlocal evictions
        evictions += len(entries)
        if evicted is not None:
            evicted(request, entries)

    for r in range(trace.requests):
        path, now = trace.path(r), float(trace.seconds[r])
        prints = trace.prints[path]
        request = Request(int(trace.output_tokens[r]), int(trace.stops[r]), trace.block_tokens)
        count = shadow.look(path, prints, request, now, _ignore)
        hits += count if r >= score_from else 0
        tell = partial(gone, r)
        shadow.put(path[:count], path[count:], prints[count:], count, request, now, tell)
    return hits, evictions


def _ignore(entries: Entries) -> None:
    """What has outlived its time is no eviction."""


# What the future would say


def optimum(trace: Trace, blocks: int, score_from: int = 0) -> Result:
    """Play Belady's policy: evict the block whose next use is the farthest, leaves first.

    A parent's next use is never later than its child's, so this keeps prefixes whole by itself.
    """
    _check_capacity(trace, blocks)
    start = time.perf_counter()
    following = np.empty(len(trace.nodes), dtype=np.int32)
    _next_uses(
        column(trace.nodes), column64(trace.offsets), trace.requests, column(following),
        column(np.full(trace.unique, NEVER, dtype=np.int32)),
    )  # fmt: skip
    hits, evictions = _belady(
        column(trace.nodes), column64(trace.offsets), trace.requests, column(following),
        column(np.full(trace.unique, -1, dtype=np.int32)), blocks, score_from,
    )  # fmt: skip
    accesses = int(trace.offsets[-1] - trace.offsets[score_from])
    return Result(int(hits), accesses, int(evictions), time.perf_counter() - start)


@compiled
def _next_uses(
    nodes: Int32s, offsets: Int64s, requests: int, following: Int32s, latest: Int32s
) -> None:
    for r in range(requests - 1, -1, -1):
        for i in range(offsets[r], offsets[r + 1]):
            following[i] = latest[nodes[i]]
            latest[nodes[i]] = r


@compiled
def _belady(
    nodes: Int32s,
    offsets: Int64s,
    requests: int,
    following: Int32s,
    uses: Int32s,
    blocks: int,
    score_from: int,
) -> tuple[int, int]:
    # `uses`: the next use of each block that is here, -1 of the others. The heap holds (the next
    # use, the block), both counted down, as one number: a child's id is above its parent's. An
    # entry that does not say its block's next use any more is stale.
    top = 2**31 - 1
    heap = [0]
    heap.pop()
    hits, evictions, size = 0, 0, 0
    for r in range(requests):
        first, last = offsets[r], offsets[r + 1]
        at = first
        while at < last and uses[nodes[at]] >= 0:
            at += 1
        if r >= score_from:
            hits += at - first
        size += last - at
        for i in range(first, last):
            uses[nodes[i]] = following[i]
            heapq.heappush(heap, (top - int(following[i])) * 2**32 + (top - int(nodes[i])))
        while size > blocks:
            least = heapq.heappop(heap)
            node = top - (least & 0xFFFFFFFF)
            if uses[node] == top - (least >> 32):
                uses[node] = -1
                size -= 1
                evictions += 1
    return hits, evictions
