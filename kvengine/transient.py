"""Blocks in memory that were fetched from a tier and not asked for again: a share of memory.

Something read once, from end to end, would otherwise take all of memory from what is used again and
again, whatever the policy. Where the share is full, a fetch takes its room from the oldest of these
and not from what the policy would give up next: they are in a tier still. The store's lock guards
this; it names blocks by the store's ids.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from kvengine.compiled import Int32s
from kvengine.index import grown
from kvengine.lease import Bools

STALE_MIN = 1024


class Transients:
    """Which blocks have been fetched only, in order of that. `pages` counts theirs."""

    def __init__(self) -> None:
        self.pages = 0
        self._sizes = np.zeros(0, dtype=np.int32)  # of each id in pages; 0: not one of these
        self._order: deque[Int32s] = deque()  # with some that are none any more
        self._count = 0  # of these
        self._listed = 0

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._sizes.nbytes + 4 * self._listed

    def add(self, ids: Int32s, pages: int) -> None:
        """Take in blocks of so many pages each, fetched now."""
        if not len(ids):
            return
        self.remove(ids)
        if (need := int(ids.max()) + 1) > len(self._sizes):
            self._sizes = grown(self._sizes, max(need, len(self._sizes) * 3 // 2), 0)
        self._sizes[ids] = pages
        self.pages += pages * len(ids)
        self._count += len(ids)
        self._order.append(ids)
        self._listed += len(ids)
        if self._listed > 2 * self._count + STALE_MIN:
            self._tidy()

    def remove(self, ids: Int32s) -> None:
        """Note that blocks were asked for again, or have left memory. Unknown ones are no error."""
        if not self._count or not len(ids):
            return
        ids = np.unique(ids[ids < len(self._sizes)])
        sizes = self._sizes[ids]
        self.pages -= int(sizes.sum())
        self._count -= int(np.count_nonzero(sizes))
        self._sizes[ids] = 0

    def oldest(self, pages: int, leases: Int32s) -> Int32s:
        """Return those to give up for so many pages, but for leased ones. leases: of each id."""
        while self._order and not self._held(self._order[0]).any():
            self._listed -= len(self._order.popleft())
        found: list[Int32s] = []
        for ids in self._order:
            if pages <= 0:
                break
            free = ids[self._held(ids) & (leases[ids] == 0)]
            sizes = np.cumsum(self._sizes[free])
            count = int(np.searchsorted(sizes, pages)) + 1
            found.append(free[:count])
            pages -= int(sizes[min(count, len(free)) - 1]) if len(free) else 0
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int32)

    def _held(self, ids: Int32s) -> Bools:
        held: Bools = self._sizes[ids] > 0
        return held

    def _tidy(self) -> None:
        """Forget, in the order, what is none of these any more; of one listed twice, the first."""
        listed = np.concatenate(self._order)[::-1]
        listed = listed[self._held(listed)]
        last = np.sort(np.unique(listed, return_index=True)[1])
        order = np.ascontiguousarray(listed[last][::-1])
        self._order = deque([order] if len(order) else [])
        self._listed = len(order)
