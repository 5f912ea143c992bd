"""What to evict: pure deciders behind one protocol.

A policy keeps metadata of the blocks that are in the arena, under integer ids. It never reads a
clock, takes a lock or touches bytes; events and time come in as arguments. The store calls it under
its own lock. Every policy passes tests/test_policy.py by being listed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Entries = NDArray[np.int32]
NO_PARENT = -1


NO_PRINTS: NDArray[np.int64] = np.empty(0, dtype=np.int64)
UNKNOWN_STOP, STOP_TOOL, STOP_END = 0, 1, 2


class UnknownPolicy(ValueError):
    """A policy of that name does not exist, or it does not take such a value."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is known of the request that uses blocks. `output_tokens` -1: not known (yet).

    `stop` says how its output ended: UNKNOWN_STOP, STOP_TOOL (a tool runs now, and its result will
    come), STOP_END (the turn has ended). `block_tokens` is how many tokens a block stands for.
    """

    output_tokens: int = -1
    stop: int = UNKNOWN_STOP
    block_tokens: int = 16


NO_REQUEST = Request()


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one prompt.

    `parent` is the id of the block before the first, or NO_PARENT; `position` the index of the
    first block in its prompt; `entry_bytes` the size of each block's slot. `prints` are the first 8
    bytes of the blocks' keys: one each, or none where they are not known; a run of `touched` may
    give more, those of the blocks of the prompt that come after and are not here.
    """

    entries: Entries
    parent: int
    position: int
    entry_bytes: int
    prints: NDArray[np.int64] = field(default_factory=lambda: NO_PRINTS)
    request: Request = NO_REQUEST


class Policy(Protocol):
    """Decide which blocks leave the arena. Entries are ids; times are seconds of one clock."""

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        ...

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena: candidates from here on."""
        ...

    def touched(self, run: Run, now: float) -> None:
        """Note that a request uses these blocks, which are the start of its prompt."""
        ...

    def held(self, entries: Entries) -> None:
        """Leave leased or pinned blocks out of the candidates."""
        ...

    def freed(self, entries: Entries) -> None:
        """Make blocks candidates again; their use ends now."""
        ...

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        ...

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates to evict, best first, leaves before their parents, until enough.

        Nothing is forgotten until `removed`. Ends early where candidates run out, or where those
        that are left are worth more than the `incoming` blocks that they would make room for (a run
        whose entries need no ids yet).
        """
        ...

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield the blocks whose time is over, as `victims` does."""
        ...
