"""What to evict: pure deciders behind one protocol.

A policy keeps metadata of the blocks that are in the arena, under integer ids. It never reads a
clock, takes a lock or touches bytes; events and time come in as arguments. The store calls it under
its own lock. Every policy passes tests/test_policy.py by being listed there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Entries = NDArray[np.int32]
NO_PARENT = -1


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of one prompt.

    `parent` is the id of the block before the first, or NO_PARENT; `position` the index of the
    first block in its prompt; `entry_bytes` the size of each block's slot.
    """

    entries: Entries
    parent: int
    position: int
    entry_bytes: int


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
        """Note that blocks were used."""
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

    def victims(self, nbytes: int, now: float) -> Iterator[Entries]:
        """Yield candidates to evict, best first, leaves before their parents, until enough.

        Nothing is forgotten until `removed`. Ends early where candidates run out.
        """
        ...
