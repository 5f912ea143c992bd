"""One slab of host memory, cut into slots of size classes.

A slot is named by its offset in pages of 4 KiB, so a name fits in 32 bits and says where the bytes
are. Size classes take extents (runs of pages) of the slab on demand and give whole free ones back.
The arena knows nothing of blocks: the store owns slots from `take` to `give`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvengine.slab import PAGE_BYTES, POPULATE_BYTES, Slab, Slots

__all__ = ["PAGE_BYTES", "POPULATE_BYTES", "Arena", "Slots"]
EXTENT_BYTES = 16 << 20
EXTENT_SLOTS = 64


class SizeClass:
    """Slots of one size: the free ones as a stack, the extents they came from."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free = np.empty(0, dtype=np.int32)
        self.count = 0
        self.extents: dict[int, int] = {}
        self.smallest = 0  # pages of the smallest extent: fewer free ones make none whole

    def push(self, slots: Slots) -> None:
        """Put slots on the stack of free ones."""
        need = self.count + len(slots)
        if need > len(self.free):
            self.free = np.resize(self.free, max(64, 2 * need))
        self.free[self.count : need] = slots
        self.count = need

    def pop(self, count: int) -> Slots:
        """Take so many slots off the stack, the last freed first (its memory is warm)."""
        self.count -= count
        return self.free[self.count : self.count + count].copy()


class Arena(Slab):
    """Memory that can be addressed. Not thread-safe: the store's lock guards it.

    `handle`: the descriptor of shared memory, private if None. Shared memory has a word for each
    page, `generations`, that is raised before a slot that begins there is lent or given back to the
    system: who has copied from a slot looks again whether it is still the same.
    """

    def __init__(
        self,
        nbytes: int,
        handle: int | None = None,
        generations: NDArray[np.uint32] | None = None,
    ) -> None:
        super().__init__(nbytes, handle)
        self.generations = generations
        pages = self.nbytes // PAGE_BYTES
        self.limit_pages = pages
        self._backed = np.zeros(pages, dtype=np.bool_)  # pages that may have memory behind them
        self.backing: Callable[[], int] | None = None  # says how many have, where it is shared
        self._holes: list[tuple[int, int]] = [(0, pages)]
        self._classes: dict[int, SizeClass] = {}
        self.taken_pages = 0

    @property
    def is_whole(self) -> bool:
        """Whether all of it may be lent."""
        return self.limit_pages * PAGE_BYTES == self.nbytes

    def pages_of(self, nbytes: int) -> int:
        """Return how many pages a slot of so many bytes has."""
        return -(-nbytes // PAGE_BYTES)

    def available(self, nbytes: int) -> int:
        """Return how many slots of this size could be taken now."""
        pages = self.pages_of(nbytes)
        known = self._classes.get(pages)
        free = known.count if known else 0
        room = (self.limit_pages - self.taken_pages) // pages
        return max(0, min(room, free + sum(size // pages for _, size in self._holes)))

    def take(self, nbytes: int, count: int) -> Slots:
        """Take up to `count` slots of at least `nbytes`; fewer where the arena is full."""
        pages = self.pages_of(nbytes)
        known = self._classes.get(pages)
        if known is None:
            known = self._classes[pages] = SizeClass(pages)
        count = max(0, min(count, (self.limit_pages - self.taken_pages) // pages))
        while known.count < count and self._extend(known):
            pass
        slots = known.pop(min(count, known.count))
        self.taken_pages += pages * len(slots)
        if self.generations is not None:
            self.generations[slots] += np.uint32(1)
            self._backed[slots[:, None] + np.arange(pages)] = True
        return slots

    def give(self, nbytes: int, slots: Slots) -> None:
        """Give slots back. The caller has made sure that nobody reads or writes them any more."""
        if len(slots):
            known = self._classes[self.pages_of(nbytes)]
            known.push(slots)
            self.taken_pages -= known.pages * len(slots)

    def generation(self, slots: Slots) -> NDArray[np.uint32]:
        """Return the words of slots; zeros where memory is private."""
        if self.generations is None:
            return np.zeros(len(slots), dtype=np.uint32)
        found = self.generations[slots]  # of NO_SLOT the last page's, which nobody looks at
        return found

    def compact(self) -> bool:
        """Give extents whose slots are all free back to the slab, for other size classes.

        Returns whether there were any.
        """
        found = False
        for known in self._classes.values():
            if known.count * known.pages < known.smallest:
                continue
            free = np.sort(known.free[: known.count])
            starts = np.array(list(known.extents), dtype=np.int64)
            pages = np.array(list(known.extents.values()), dtype=np.int64)
            first, last = np.searchsorted(free, starts), np.searchsorted(free, starts + pages)
            whole = last - first == pages // known.pages
            if not whole.any():
                continue
            found = True
            keep = np.ones(len(free), dtype=np.bool_)
            for start, begin, end in zip(starts[whole], first[whole], last[whole], strict=True):
                self._holes.append((int(start), known.extents.pop(int(start))))
                keep[begin:end] = False
            free = free[keep]
            known.free, known.count = free, len(free)
        self._holes = _merge(self._holes)
        return found

    def limit(self, nbytes: int) -> int:
        """Lend at most so many bytes from now on; what is lent already stays.

        Where memory is shared, and more has been in use, all that is free is given back to the
        system: it is zero when it is used again, and others may have as much. Returns how many
        bytes of it are in use still; call again when more of them have been evicted.
        """
        self.limit_pages = min(nbytes, self.nbytes) // PAGE_BYTES
        if not self.is_whole:
            self.stop()  # of `populate`
        # A client may have written where nothing was lent to it: the system knows.
        backed = 0 if self.is_whole or self.backing is None else self.backing()
        if max(int(np.count_nonzero(self._backed)), backed) > self.limit_pages:
            free = [
                run
                for known in self._classes.values()
                for run in _runs(np.sort(known.free[: known.count]), known.pages)
            ]
            for start, size in free + self._holes:
                if self.generations is not None:
                    self.generations[start : start + size] += np.uint32(1)
                self.punch(start, size)
                self._backed[start : start + size] = False
        return int(np.count_nonzero(self._backed)) * PAGE_BYTES

    def populate(self, nbytes: int | None = None) -> None:
        """See Slab.populate. Memory of which a part is another's is left as it is."""
        if self.is_whole:
            self._backed[:] = self.generations is not None
            super().populate(nbytes)

    def _extend(self, known: SizeClass) -> bool:
        # Small extents at first leave room for other classes; a sixteenth of the slab at most
        # keeps the count of extents small.
        want = max(EXTENT_BYTES // PAGE_BYTES, EXTENT_SLOTS * known.pages)
        want = min(want, self.nbytes // PAGE_BYTES // 16)
        want = max(1, want // known.pages) * known.pages
        fitting = [hole for hole in self._holes if hole[1] >= known.pages]
        if not fitting:
            return False
        start, size = max(fitting, key=lambda hole: hole[1])
        used = min(want, size // known.pages * known.pages)
        self._holes.remove((start, size))
        if size > used:
            self._holes.append((start + used, size - used))
        known.extents[start] = used
        known.smallest = min(known.extents.values())
        slots = np.arange(start, start + used, known.pages, dtype=np.int32)
        known.push(slots[::-1])
        return True


def _runs(slots: Slots, pages: int) -> Iterator[tuple[int, int]]:
    """Join neighbouring slots, sorted, to runs: the first page and how many."""
    if len(slots):
        cuts = np.flatnonzero(np.diff(slots) != pages) + 1
        for run in np.split(slots, cuts):
            yield int(run[0]), len(run) * pages


def _merge(holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, size in sorted(holes):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    return merged
