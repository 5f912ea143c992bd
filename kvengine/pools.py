"""Several pools of one prompt: how much of it is there in all of them.

A model with more than one kind of attention keeps a cache of each kind: its pools, each a namespace
with a layout of its own. To go on after n tokens, full attention needs all blocks before, a sliding
window its sinks and the last ones, a recurrent state the last one alone. A prompt is hit as far as
every pool has what it needs there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvengine.errors import LayoutError
from kvengine.keys import BlockKeys
from kvengine.layout import Layout
from kvengine.lease import Bools, Lease
from kvengine.policy import Request

TRIES = 4


class PoolMatch:
    """The first `tokens` of a prompt, held in every pool. A context manager; `release` ends it.

    `leases[i]` are those of pool i: of full attention one, of as many blocks as it holds, of which
    the first `tokens` count; of a window one for its sinks and one for the rest, as far as they are
    two. `lease.keys.position` says where in the prompt a lease begins: load each to its place.
    """

    def __init__(self, tokens: int, leases: Sequence[Sequence[Lease]]) -> None:
        self.tokens = tokens
        self.leases = leases

    def __enter__(self) -> PoolMatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let all blocks go. Idempotent."""
        for leases in self.leases:
            for lease in leases:
                lease.release()


class Blocks(Protocol):
    """What an engine, or a daemon's client, is asked."""

    def contains(self, keys: BlockKeys) -> Bools: ...
    def match(self, keys: BlockKeys, *, request: Request | None = None) -> Lease: ...


def match_pools(
    engine: Blocks, tables: Sequence[BlockKeys], request: Request | None = None
) -> PoolMatch:
    """Hold the longest start of a prompt that every pool can go on from. tables: a pool's each.

    What leaves between the question and the lease makes it ask again, for less; after TRIES times
    nothing is hit. Raises LayoutError for no tables, or keys of a part of the prompt.
    """
    if not tables:
        raise LayoutError("no pools: give the keys of at least one")
    for number, keys in enumerate(tables):
        if keys.position:
            raise LayoutError(
                f"the keys of pool {number} begin at block {keys.position}, expected whole prompts"
            )
    layouts = [keys.namespace.layout for keys in tables]
    tokens: int | None = None
    for _ in range(TRIES):
        tokens = longest([engine.contains(keys) for keys in tables], layouts, tokens)
        leases = [_leased(engine, keys, tokens, request) for keys in tables]
        match = PoolMatch(tokens, [[lease for lease, _ in each] for each in leases])
        if tokens and all(lease.blocks >= count for each in leases for lease, count in each):
            return match
        match.release()
        if not tokens:
            break
    return PoolMatch(0, [[] for _ in tables])


def _leased(
    engine: Blocks, keys: BlockKeys, tokens: int, request: Request | None
) -> list[tuple[Lease, int]]:
    """Lease what a pool needs; beside each lease, how many blocks it is to have."""
    layout = keys.namespace.layout
    blocks = tokens // layout.block_tokens
    if layout.attention == "full":
        return [(engine.match(keys, request=request), blocks)]
    parts = needed(layout, blocks)
    return [(engine.match(keys[part], request=request), part.stop - part.start) for part in parts]


def needed(layout: Layout, blocks: int) -> list[slice]:
    """Return which of the first so many blocks a pool needs to go on after them, in order."""
    if layout.attention == "full":
        return [slice(0, blocks)]
    sinks = min(layout.sink_blocks, blocks)
    window = max(0, blocks - layout.window_blocks)
    parts = [slice(0, sinks), slice(window, blocks)] if window > sinks else [slice(0, blocks)]
    return [part for part in parts if part.start < part.stop]


def longest(held: Sequence[Bools], layouts: Sequence[Layout], most: int | None = None) -> int:
    """Return after how many tokens all pools have what they need, at most `most`.

    held: for each pool, which of the prompt's blocks it has. O(blocks).
    """
    step = math.lcm(*(layout.block_tokens for layout in layouts))
    lengths = [
        len(here) * layout.block_tokens // step for here, layout in zip(held, layouts, strict=True)
    ]
    count = min(lengths) if most is None else min(*lengths, most // step)
    fine = np.ones(count + 1, dtype=np.bool_)
    for here, layout in zip(held, layouts, strict=True):
        fine &= _enough(here, layout)[:: step // layout.block_tokens][: count + 1]
    return int(np.flatnonzero(fine)[-1]) * step


def _enough(held: Bools, layout: Layout) -> NDArray[np.bool_]:
    """Say for each number of blocks, 0 to all, whether what is needed after them is held."""
    numbers = np.arange(len(held) + 1)
    # The first block before each number from which on all are held, up to it.
    lacking = np.concatenate([[0], np.maximum.accumulate(np.where(held, 0, numbers[1:]))])
    if layout.attention == "full":
        whole: NDArray[np.bool_] = lacking == 0
        return whole
    sinks = layout.sink_blocks
    first = int(held[:sinks].argmin()) if not held[:sinks].all() else len(held)
    recent = lacking <= np.maximum(0, numbers - layout.window_blocks)
    enough: NDArray[np.bool_] = recent & (numbers <= first)
    return enough
