"""One slab of host memory, cut into slots of size classes.

A slot is named by its offset in pages of 4 KiB, so a name fits in 32 bits and says where the bytes
are. Size classes take extents (runs of pages) of the slab on demand and give whole free ones back.
The arena knows nothing of blocks: the store owns slots from `take` to `give`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvengine.errors import ConfigError

PAGE_BYTES = 4096
EXTENT_BYTES = 16 << 20
EXTENT_SLOTS = 64
POPULATE_BYTES = 4 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap names neither
MADV_WIPEONFORK = 18  # Linux 4.14
Slots = NDArray[np.int32]


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


class Arena:
    """Memory that can be addressed. Not thread-safe: the store's lock guards it."""

    def __init__(self, nbytes: int) -> None:
        pages = nbytes // PAGE_BYTES
        if pages < 1:
            raise ConfigError(f"an arena needs at least {PAGE_BYTES} bytes, got {nbytes}")
        self.nbytes = pages * PAGE_BYTES
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A forked child has no use for the slab: it is not to hold copies of what changes here.
        for advice in (getattr(mmap, "MADV_HUGEPAGE", None), MADV_WIPEONFORK):
            try:
                if advice is not None:
                    self._map.madvise(advice)
            except OSError:
                pass  # a kernel that does not know it: the slab works all the same
        self.memory = memoryview(self._map)
        self.address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self._holes: list[tuple[int, int]] = [(0, pages)]
        self._classes: dict[int, SizeClass] = {}
        self.taken_pages = 0
        self._stopped = False

    def pages_of(self, nbytes: int) -> int:
        """Return how many pages a slot of so many bytes has."""
        return -(-nbytes // PAGE_BYTES)

    def available(self, nbytes: int) -> int:
        """Return how many slots of this size could be taken now."""
        pages = self.pages_of(nbytes)
        known = self._classes.get(pages)
        free = known.count if known else 0
        return free + sum(size // pages for _, size in self._holes)

    def take(self, nbytes: int, count: int) -> Slots:
        """Take up to `count` slots of at least `nbytes`; fewer where the arena is full."""
        pages = self.pages_of(nbytes)
        known = self._classes.get(pages)
        if known is None:
            known = self._classes[pages] = SizeClass(pages)
        while known.count < count and self._extend(known):
            pass
        slots = known.pop(min(count, known.count))
        self.taken_pages += pages * len(slots)
        return slots

    def give(self, nbytes: int, slots: Slots) -> None:
        """Give slots back. The caller has made sure that nobody reads or writes them any more."""
        if len(slots):
            known = self._classes[self.pages_of(nbytes)]
            known.push(slots)
            self.taken_pages -= known.pages * len(slots)

    def offsets(self, slots: Slots) -> NDArray[np.int64]:
        """Return where slots begin, in bytes from the start of the slab."""
        return slots.astype(np.int64) * PAGE_BYTES

    def addresses(self, slots: Slots) -> NDArray[np.int64]:
        """Return where slots begin, as addresses in this process."""
        return self.offsets(slots) + self.address

    def view(self, slot: int, nbytes: int) -> memoryview:
        """Return the first `nbytes` of a slot, writable."""
        return self.memory[slot * PAGE_BYTES : slot * PAGE_BYTES + nbytes]

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

    def populate(self) -> None:
        """Have the system back the whole slab with memory, so that no save waits for page faults.

        Changes no byte; takes seconds for many gigabytes, so it runs on a thread of its own, from
        the start of the slab, where slots are taken first. Ends early after `stop`.
        """
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
        for start in range(0, self.nbytes, POPULATE_BYTES):
            size = min(POPULATE_BYTES, self.nbytes - start)
            if self._stopped or advise(self.address + start, size, MADV_POPULATE_WRITE):
                return

    def stop(self) -> None:
        """End `populate` soon."""
        self._stopped = True

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


def _merge(holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, size in sorted(holes):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((start, size))
    return merged
