"""Blocks that have left, known by their prints: 64 bits of the key, in lists, oldest first.

A print says too little to serve a block, and enough to guess that it came back. Open hashing over
columns; a record costs 28 bytes.
"""

from __future__ import annotations

import numpy as np

from kvengine.compiled import Int32s, Int64s, column, column64, compiled

# Columns of a record. The records 0..lists-1 are the ends of the lists.
CHAIN, PREV, NEXT, LIST = 0, 1, 2, 3
WIDTH = 4
RECORDS_MIN = 64


@compiled
def bucket_of(block_print: int, mask: int) -> int:
    return int((block_print >> 20) & mask)


@compiled
def find(records: Int32s, prints: Int64s, buckets: Int32s, mask: int, block_print: int) -> int:
    record = int(buckets[(block_print >> 20) & mask])
    while record >= 0 and prints[record] != block_print:
        record = int(records[record * 4])
    return record


@compiled
def forget(records: Int32s, prints: Int64s, buckets: Int32s, mask: int, record: int) -> None:
    # Out of its bucket and its list, to the free ones: a chain that begins at the end of list 0.
    at = (prints[record] >> 20) & mask
    other = int(buckets[at])
    if other == record:
        buckets[at] = records[record * 4]
    else:
        while records[other * 4] != record:
            other = int(records[other * 4])
        records[other * 4] = records[record * 4]
    before, after = records[record * 4 + 1], records[record * 4 + 2]
    records[before * 4 + 2] = after
    records[after * 4 + 1] = before
    records[record * 4] = records[0]
    records[0] = record


@compiled
def remember(
    records: Int32s, prints: Int64s, buckets: Int32s, mask: int, which: int, block_print: int
) -> None:
    # The newest of its list. There must be a free record.
    record = records[0]
    records[0] = records[record * 4]
    prints[record] = block_print
    at = (block_print >> 20) & mask
    records[record * 4] = buckets[at]
    buckets[at] = record
    last = records[which * 4 + 1]
    records[record * 4 + 1] = last
    records[record * 4 + 2] = which
    records[record * 4 + 3] = which
    records[last * 4 + 2] = record
    records[which * 4 + 1] = record


@compiled
def _rebuild(records: Int32s, prints: Int64s, buckets: Int32s, mask: int, lists: int) -> None:
    for which in range(lists):
        record = records[which * 4 + 2]
        while record != which:
            at = (prints[record] >> 20) & mask
            records[record * 4] = buckets[at]
            buckets[at] = record
            record = records[record * 4 + 2]


@compiled
def _chain_free(records: Int32s, first: int, last: int) -> None:
    for record in range(last - 1, first - 1, -1):
        records[record * 4] = records[0]
        records[0] = record


class Ghosts:
    """Lists of prints, grown before they are written."""

    def __init__(self, lists: int) -> None:
        self._lists = lists
        self.records: Int32s = np.zeros(WIDTH * lists, dtype=np.int32)
        self.prints: Int64s = np.zeros(lists, dtype=np.int64)
        self.buckets: Int32s = np.full(RECORDS_MIN, -1, dtype=np.int32)
        self.records[CHAIN::WIDTH] = -1
        self.records[PREV::WIDTH] = self.records[NEXT::WIDTH] = np.arange(lists)

    @property
    def nbytes(self) -> int:
        """Bytes in the columns."""
        return self.records.nbytes + self.prints.nbytes + self.buckets.nbytes

    def fit(self, count: int) -> None:
        """Make room for `count` records in all."""
        before = len(self.prints)
        if count + self._lists <= before:
            return
        size = max(count + self._lists, before * 5 // 4, RECORDS_MIN)
        records = np.zeros(WIDTH * size, dtype=np.int32)
        records[: len(self.records)] = self.records
        prints = np.zeros(size, dtype=np.int64)
        prints[:before] = self.prints
        self.records, self.prints = records, prints
        _chain_free(column(records), before, size)
        if size > len(self.buckets):
            self.buckets = np.full(1 << (size - 1).bit_length(), -1, dtype=np.int32)
            _rebuild(
                column(records), column64(prints), column(self.buckets), len(self.buckets) - 1,
                self._lists,
            )  # fmt: skip
