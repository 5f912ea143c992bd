"""Which blocks are held, and where: columns of numbers, one row a block, no object a block.

`KeyTable` maps 32-byte keys to small integer ids (open addressing, linear probing, backward-shift
deletion; source: Knuth, The Art of Computer Programming 3, 6.4). `Index` adds what the store must
know of each block. Nothing here locks: the store's lock guards it.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled

Words = NDArray[np.uint64]
Number = TypeVar("Number", bound=np.number)  # one column, its kind kept

FREE, FILLING, COMMITTED, DOOMED = 0, 1, 2, 3
SLOT, LEASES, NAMESPACE, STATE = 0, 1, 2, 3
NO_SLOT = -1
STATE_MASK = 0xFF
TIER_SHIFT = 8
ROWS_MIN = 1024


@compiled
def _find(words: Int64s, count: int, keys: Int64s, table: Int32s, mask: int, ids: Int32s) -> None:
    for i in range(count):
        at = words[4 * i] & mask
        found = -1
        while True:
            row = table[at]
            if row < 0:
                break
            if (
                keys[4 * row] == words[4 * i]
                and keys[4 * row + 1] == words[4 * i + 1]
                and keys[4 * row + 2] == words[4 * i + 2]
                and keys[4 * row + 3] == words[4 * i + 3]
            ):
                found = row
                break
            at = (at + 1) & mask
        ids[i] = found


@compiled
def _prefix(
    words: Int64s,
    count: int,
    keys: Int64s,
    table: Int32s,
    mask: int,
    rows: Int32s,
    namespace: int,
    bits: int,
    ids: Int32s,
) -> tuple[int, int]:
    # Writes the ids of the leading keys that are held, in memory or a tier of `bits`. Returns how
    # many there are, and how many of them, leading, are in memory.
    in_memory = -1
    for i in range(count):
        at = words[4 * i] & mask
        while True:
            row = table[at]
            if row < 0:
                return i, i if in_memory < 0 else in_memory
            if (
                keys[4 * row] == words[4 * i]
                and keys[4 * row + 1] == words[4 * i + 1]
                and keys[4 * row + 2] == words[4 * i + 2]
                and keys[4 * row + 3] == words[4 * i + 3]
            ):
                break
            at = (at + 1) & mask
        state = rows[4 * row + 3]
        if rows[4 * row + 2] >> 1 != namespace >> 1 or state & 0xFF != 2:
            return i, i if in_memory < 0 else in_memory
        if rows[4 * row] < 0:
            if state >> 8 & bits == 0:
                return i, i if in_memory < 0 else in_memory
            if in_memory < 0:
                in_memory = i
        ids[i] = row
    return count, count if in_memory < 0 else in_memory


@compiled
def _claim(
    words: Int64s,
    count: int,
    keys: Int64s,
    table: Int32s,
    mask: int,
    free: Int32s,
    free_count: int,
    ids: Int32s,
    fresh: Int32s,
) -> int:
    for i in range(count):
        at = words[4 * i] & mask
        found = -1
        while True:
            row = table[at]
            if row < 0:
                break
            if (
                keys[4 * row] == words[4 * i]
                and keys[4 * row + 1] == words[4 * i + 1]
                and keys[4 * row + 2] == words[4 * i + 2]
                and keys[4 * row + 3] == words[4 * i + 3]
            ):
                found = row
                break
            at = (at + 1) & mask
        fresh[i] = 0
        if found < 0:
            free_count -= 1
            found = free[free_count]
            for j in range(4):
                keys[4 * found + j] = words[4 * i + j]
            table[at] = found
            fresh[i] = 1
        ids[i] = found
    return free_count


@compiled
def _erase(ids: Int32s, count: int, keys: Int64s, table: Int32s, mask: int) -> None:
    for i in range(count):
        row = ids[i]
        at = keys[4 * row] & mask
        while table[at] != row:
            at = (at + 1) & mask
        hole = at
        while True:
            at = (at + 1) & mask
            other = table[at]
            if other < 0:
                break
            home = keys[4 * other] & mask
            if ((at - home) & mask) >= ((at - hole) & mask):
                table[hole] = other
                hole = at
        table[hole] = -1


@compiled
def _rebuild(live: Int32s, count: int, keys: Int64s, table: Int32s, mask: int) -> None:
    for i in range(count):
        at = keys[4 * live[i]] & mask
        while table[at] >= 0:
            at = (at + 1) & mask
        table[at] = live[i]


@compiled
def _lease(ids: Int32s, count: int, rows: Int32s, edge: Int32s) -> int:
    # Writes the ids that had no lease, in order.
    changed = 0
    for i in range(count):
        at = 4 * ids[i] + 1
        rows[at] += 1
        if rows[at] == 1:
            edge[changed] = ids[i]
            changed += 1
    return changed


@compiled
def _unlease(ids: Int32s, count: int, rows: Int32s, edge: Int32s) -> tuple[int, int]:
    # Writes the ids that have no lease now: from the front, but those that are doomed from the end.
    free = 0
    last = count
    for i in range(count):
        at = 4 * ids[i]
        rows[at + 1] -= 1
        if rows[at + 1] == 0:
            if rows[at + 3] & 0xFF == 3:
                last -= 1
                edge[last] = ids[i]
            else:
                edge[free] = ids[i]
                free += 1
    return free, last


class KeyTable:
    """Keys of 32 bytes to ids 0..capacity-1. Grows by half; ids stay the same."""

    def __init__(self) -> None:
        self.capacity = ROWS_MIN
        self.count = 0
        self._keys = np.zeros(4 * self.capacity, dtype=np.int64)
        self._free = np.arange(self.capacity - 1, -1, -1, dtype=np.int32)
        self._free_count = self.capacity
        self._table = np.full(2 * self.capacity, -1, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in the columns."""
        return self._keys.nbytes + self._free.nbytes + self._table.nbytes

    def find(self, words: Words) -> Int32s:
        """Return the id of each key, -1 where it is not held. words: uint64[n, 4]."""
        ids = np.empty(len(words), dtype=np.int32)
        flat = words.view(np.int64).reshape(-1)
        mask = len(self._table) - 1
        _find(
            column64(flat),
            len(words),
            column64(self._keys),
            column(self._table),
            mask,
            column(ids),
        )
        return ids

    def claim(self, words: Words) -> tuple[Int32s, NDArray[np.bool_]]:
        """Return the id of each key and whether it is new. A key named twice is new once."""
        while self._free_count < len(words):
            self._grow()
        ids = np.empty(len(words), dtype=np.int32)
        fresh = np.empty(len(words), dtype=np.int32)
        before = self._free_count
        self._free_count = _claim(
            column64(words.view(np.int64).reshape(-1)),
            len(words),
            column64(self._keys),
            column(self._table),
            len(self._table) - 1,
            column(self._free),
            before,
            column(ids),
            column(fresh),
        )
        self.count += before - self._free_count
        return ids, fresh.astype(np.bool_)

    def erase(self, ids: Int32s) -> None:
        """Forget keys: no look-up finds them. Their ids are not given out again until `free`."""
        _erase(
            column(ids),
            len(ids),
            column64(self._keys),
            column(self._table),
            len(self._table) - 1,
        )
        self.count -= len(ids)

    def free(self, ids: Int32s) -> None:
        """Give erased ids out again."""
        self._free[self._free_count : self._free_count + len(ids)] = ids
        self._free_count += len(ids)

    def keys(self, ids: Int32s) -> NDArray[np.uint8]:
        """Return uint8[n, 32] keys."""
        return self._keys.reshape(-1, 4)[ids].view(np.uint8).reshape(-1, 32)

    def prints(self, ids: Int32s) -> Int64s:
        """Return int64[n]: the first 8 bytes of each key."""
        return self._keys[4 * ids]

    def live(self) -> Int32s:
        """Return all ids that a look-up can find, in no order."""
        return self._table[self._table >= 0]

    def _grow(self) -> None:
        before = self.capacity
        self.capacity = before + before // 2
        self._keys = grown(self._keys, 4 * self.capacity, 0)
        fresh = np.arange(self.capacity - 1, before - 1, -1, dtype=np.int32)
        free = np.empty(self.capacity, dtype=np.int32)
        free[: len(fresh)] = fresh
        free[len(fresh) : len(fresh) + self._free_count] = self._free[: self._free_count]
        self._free, self._free_count = free, self._free_count + len(fresh)
        live = self.live()
        size = len(self._table)
        while size < 2 * self.capacity:
            size *= 2
        if size != len(self._table):
            self._table = np.full(size, -1, dtype=np.int32)
            _rebuild(column(live), len(live), column64(self._keys), column(self._table), size - 1)
        self._resize_columns(self.capacity)

    def _resize_columns(self, capacity: int) -> None:
        """Make room in a subclass's own columns."""


class Index(KeyTable):
    """A row for each block: slot in the arena, leases, namespace, state and tiers."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = np.zeros(4 * self.capacity, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in the columns."""
        return super().nbytes + self._rows.nbytes

    @property
    def rows(self) -> NDArray[np.int32]:
        """int32[capacity, 4]: SLOT, LEASES, NAMESPACE, STATE (state | tier bits << 8)."""
        return self._rows.reshape(-1, 4)

    def start(self, ids: Int32s, namespace: int) -> None:
        """Make new rows FILLING, without a slot, leased once by their reservation."""
        self.rows[ids] = (NO_SLOT, 1, namespace, FILLING)

    def prefix(self, words: Words, namespace: int, bits: int) -> tuple[Int32s, int]:
        """Return the ids of the leading keys whose blocks a namespace holds, in memory or in one of
        the tiers named by `bits`, and how many of them, leading, are in memory.

        words: uint64[n, 4].
        """
        ids = np.empty(len(words), dtype=np.int32)
        count, in_memory = _prefix(
            column64(words.view(np.int64).reshape(-1)),
            len(words),
            column64(self._keys),
            column(self._table),
            len(self._table) - 1,
            column(self._rows),
            namespace,
            bits,
            column(ids),
        )
        return ids[:count], in_memory

    def states(self, ids: Int32s) -> NDArray[np.int32]:
        """Return FREE, FILLING, COMMITTED or DOOMED for each."""
        states: NDArray[np.int32] = self.rows[ids, STATE] & STATE_MASK
        return states

    def tiers(self, ids: Int32s) -> NDArray[np.int32]:
        """Return the bits of the tiers that hold each."""
        tiers: NDArray[np.int32] = self.rows[ids, STATE] >> TIER_SHIFT
        return tiers

    def set_state(self, ids: Int32s, state: int) -> None:
        """Change the state, keep the tier bits."""
        rows = self.rows
        rows[ids, STATE] = (rows[ids, STATE] & ~STATE_MASK) | state

    def add_tier(self, ids: Int32s, tier: int) -> None:
        """Note that a tier holds these blocks."""
        self.rows[ids, STATE] |= 1 << (TIER_SHIFT + tier)

    def remove_tier(self, ids: Int32s, tier: int) -> None:
        """Note that a tier holds these blocks no more."""
        self.rows[ids, STATE] &= ~(1 << (TIER_SHIFT + tier))

    def lease(self, ids: Int32s) -> Int32s:
        """Count one lease more on each; return those that had none."""
        edge = np.empty(len(ids), dtype=np.int32)
        return edge[: _lease(column(ids), len(ids), column(self._rows), column(edge))]

    def unlease(self, ids: Int32s) -> tuple[Int32s, Int32s]:
        """Count one lease less on each; return those that have none now, and of these apart those
        that are DOOMED.
        """
        edge = np.empty(len(ids), dtype=np.int32)
        free, doomed = _unlease(column(ids), len(ids), column(self._rows), column(edge))
        return edge[:free], edge[doomed:]

    def _resize_columns(self, capacity: int) -> None:
        self._rows = grown(self._rows, 4 * capacity, 0)


def grown(array: NDArray[Number], size: int, fill: int) -> NDArray[Number]:
    """Return a longer copy of a column, the rest filled."""
    if len(array) >= size:
        return array
    longer = np.full(size, fill, dtype=array.dtype)
    longer[: len(array)] = array
    return longer
