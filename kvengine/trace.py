"""Traces of requests: read them, and replay them against a policy.

A trace is a list of requests; a request is a path of blocks from the start of its prompt, each
block standing for itself and all before it. Only full blocks count. A request hits its longest
cached prefix and adds the rest of its prompt; the output is not cached before the next request
carries it. Times do not go back.

    trace = read("conversation_trace.jsonl")
    simulate(trace, LRU(), blocks=4096).hit_ratio

Formats: `.npz` (a prefix tree and paths in it: `parent_delta`, `leaf`, `nblk`, `t_ms`, `in_tok`,
`out_tok`, `stop`, `block_tokens`), Mooncake's JSON lines (`timestamp` in ms, `hash_ids` of 512
tokens) and Qwen-Bailian's (`chat_id`, `timestamp` in s, `hash_ids` of 16 tokens).
"""

from __future__ import annotations

import heapq
import time
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.errors import TraceError
from kvengine.policy import NO_PARENT, Entries, Policy, Request, Run

MOONCAKE_TOKENS, BAILIAN_TOKENS = 512, 16
PAGE_BYTES = 4096
NEVER = (1 << 31) - 1
BLOCKS_MAX = 1 << 30
TOKENS_MAX = 1 << 30


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
            self.output_tokens, self.stops, _prints(len(unique)),
        )  # fmt: skip

    def first(self, count: int) -> Trace:
        """Return the first `count` requests alone."""
        offsets = self.offsets[: count + 1]
        unique, nodes = np.unique(self.nodes[: int(offsets[-1])], return_inverse=True)
        return Trace(
            self.name, self.block_tokens, nodes.astype(np.int32), offsets, self.seconds[:count],
            self.output_tokens[:count], self.stops[:count], _prints(len(unique)),
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


# Reading


def read(path: str | Path, block_tokens: int | None = None) -> Trace:
    """Read a trace. `block_tokens`: what one hash of a JSON trace covers, if not the usual.

    Raises TraceError: the file, the line, what was expected.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            return _read_tree(path)
        with path.open("rb") as stream:
            return _read_lines(path, stream, block_tokens)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    chat_id: int | str | None = None


def _read_lines(path: Path, stream: Iterable[bytes], block_tokens: int | None) -> Trace:
    decoder = msgspec.json.Decoder(_Line)
    known: dict[tuple[int, int], int] = {}
    nodes, offsets = array("i"), array("q", [0])
    seconds, outputs = array("d"), array("i")
    unit, tokens = 0.0, block_tokens or 0
    for number, text in enumerate(stream, 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(
                f"{where}: {error}; expected one JSON object a line with timestamp, input_length, "
                "output_length and hash_ids (Mooncake, Qwen-Bailian)"
            ) from None
        if not unit:
            bailian = line.chat_id is not None
            unit = 1.0 if bailian else 1e-3
            tokens = tokens or (BAILIAN_TOKENS if bailian else MOONCAKE_TOKENS)
        now = line.timestamp * unit
        _check_line(where, line, now, seconds, tokens)
        parent = -1
        for name in line.hash_ids[: line.input_length // tokens]:
            parent = known.setdefault((parent, name), len(known))
            nodes.append(parent)
        offsets.append(len(nodes))
        seconds.append(now)
        outputs.append(line.output_length)
    if not seconds:
        raise TraceError(f"{path}: no requests; expected one JSON object a line")
    return Trace(
        path.stem, tokens, np.array(nodes, np.int32), np.array(offsets, np.int64),
        np.array(seconds, np.float64), np.array(outputs, np.int32),
        np.zeros(len(seconds), np.int32), _prints(len(known)),
    )  # fmt: skip


def _check_line(where: str, line: _Line, now: float, seconds: Sequence[float], tokens: int) -> None:
    if not 0 <= now < 1e12:
        raise TraceError(f"{where}: timestamp {line.timestamp}: expected a time from 0 on")
    if seconds and now < seconds[-1]:
        raise TraceError(
            f"{where}: timestamp {line.timestamp} goes back by {seconds[-1] - now:.3f} s: "
            "expected requests in order of time; sort the file"
        )
    if not (0 <= line.input_length < TOKENS_MAX and 0 <= line.output_length < TOKENS_MAX):
        raise TraceError(f"{where}: input_length and output_length: expected 0 to {TOKENS_MAX}")
    blocks = line.input_length // tokens
    if len(line.hash_ids) < blocks:
        raise TraceError(
            f"{where}: {len(line.hash_ids)} hash_ids for {line.input_length} tokens: expected at "
            f"least {blocks} of {tokens} tokens each; is the line cut off, or the size another?"
        )


def _read_tree(path: Path) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: not a whole .npz file: {error}") from None
    for name in ("parent_delta", "leaf", "nblk", "t_ms", "out_tok", "stop", "block_tokens"):
        if name not in columns:
            raise TraceError(f"{path}: no column {name!r}: expected a prefix tree and its requests")
    count = len(columns["parent_delta"])
    parents = np.arange(count) - 1 - columns["parent_delta"].astype(np.int64)
    leaves, counts = columns["leaf"].astype(np.int64), columns["nblk"].astype(np.int64)
    seconds = columns["t_ms"].astype(np.float64) / 1000
    if len({len(columns[name]) for name in ("leaf", "nblk", "t_ms", "out_tok", "stop")}) != 1:
        raise TraceError(f"{path}: leaf, nblk, t_ms, out_tok and stop: expected equal lengths")
    back = np.flatnonzero(np.diff(seconds) < 0)
    if len(back):
        raise TraceError(
            f"{path}, request {int(back[0]) + 1}: its time goes back: expected order of time"
        )
    sound = count and (parents >= -1).all() and (parents < np.arange(count)).all()
    if not sound or leaves.min(initial=0) < -1 or leaves.max(initial=0) >= count:
        raise TraceError(f"{path}: parent_delta or leaf points outside the tree")
    if counts.min(initial=0) < 0 or counts.sum() > BLOCKS_MAX:
        raise TraceError(f"{path}: nblk: expected 0 on, at most {BLOCKS_MAX} in all")
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    nodes = np.empty(int(offsets[-1]), dtype=np.int32)
    bad = _walk(
        column(parents.astype(np.int32)), column(leaves.astype(np.int32)), column64(offsets),
        len(leaves), column(nodes),
    )  # fmt: skip
    if bad >= 0:
        raise TraceError(f"{path}, request {bad}: nblk is not the depth of its leaf")
    unique, named = np.unique(nodes, return_inverse=True)
    return Trace(
        path.stem, int(columns["block_tokens"]), named.astype(np.int32), offsets, seconds,
        columns["out_tok"].astype(np.int32), columns["stop"].astype(np.int32),
        _prints(len(unique)),
    )  # fmt: skip


@compiled
def _walk(parents: Int32s, leaves: Int32s, offsets: Int64s, count: int, nodes: Int32s) -> int:
    # Returns the first request whose path is not as long as it says, -1 where all are.
    for r in range(count):
        at, node = offsets[r + 1] - 1, int(leaves[r])
        while at >= offsets[r] and node >= 0:
            nodes[at] = node
            node = int(parents[node])
            at -= 1
        if at >= offsets[r] or (offsets[r + 1] > offsets[r] and node >= 0):
            return r
    return -1


def _prints(count: int) -> Int64s:
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
    present = np.zeros(trace.unique, dtype=np.bool_)
    resident = hits = evictions = 0
    for r in range(trace.requests):
        path, now = trace.path(r), float(trace.seconds[r])
        for gone in policy.expired(now):
            policy.removed(gone)
            present[gone] = False
            resident -= len(gone)
        here = present[path]
        count = len(path) if here.all() else int(here.argmin())
        hits += count if r >= score_from else 0
        prefix, rest = path[:count], path[count:]
        request = Request(int(trace.output_tokens[r]), int(trace.stops[r]), trace.block_tokens)
        policy.held(prefix)
        run = Run(prefix, NO_PARENT, 0, PAGE_BYTES, trace.prints[path], request)
        policy.touched(run, now)
        policy.freed(prefix)
        missing = len(rest) - (blocks - resident)
        above = int(prefix[-1]) if count else NO_PARENT
        if missing > 0:
            policy.held(prefix)
            incoming = Run(rest, above, count, PAGE_BYTES, trace.prints[rest], request)
            for victims in policy.victims(missing * PAGE_BYTES, now, incoming):
                policy.removed(victims)
                present[victims] = False
                resident -= len(victims)
                evictions += len(victims)
                if evicted is not None:
                    evicted(r, victims)
            policy.freed(prefix)
        rest = rest[: blocks - resident]
        if len(rest):
            policy.added(Run(rest, above, count, PAGE_BYTES, trace.prints[rest], request), now)
            present[rest] = True
            resident += len(rest)
    return hits, evictions


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
