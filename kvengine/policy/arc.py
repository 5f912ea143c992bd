"""ARC (Megiddo and Modha, FAST 2003), leaf first: one queue of blocks used once, one of the others.

How much of the memory the blocks used once may take follows from which of those evicted lately come
back. A request's blocks are judged together: the target moves when they are added, after the
victims that make room for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.policy import Entries, Run
from kvengine.policy.ghosts import Ghosts, find, forget, remember
from kvengine.policy.queues import (
    Queues,
    enter,
    leave,
    link_newest,
    oldest,
    pages_of,
    renew,
    restore,
    take,
)

ONCE, OFTEN = 0, 1
# Columns of the books: blocks in either queue, ghosts of either, the capacity, and the target.
CAPACITY, TARGET = 4, 5


@compiled
def _add(
    nodes: Int32s, used: Int32s, prints: Int64s, entries: Int32s, names: Int64s, count: int,
    above: int, pages: int, records: Int32s, ghosts: Int64s, buckets: Int32s, mask: int,
    books: Int64s,
) -> None:  # fmt: skip
    named = len(names) == count
    for i in range(count):
        node = entries[i] + 2
        enter(nodes, node, above, pages, 0)
        above = node
        queue = 0
        prints[entries[i]] = names[i] if named else 0
        record = find(records, ghosts, buckets, mask, names[i]) if named else -1
        if record >= 0:
            which = records[record * 4 + 3]
            once, often = max(1, books[2]), max(1, books[3])
            # The target counts in 1/1024 of a block.
            if which == 0:
                books[5] = min(books[4] * 1024, books[5] + max(1024, books[3] * 1024 // once))
            else:
                books[5] = max(0, books[5] - max(1024, books[2] * 1024 // often))
            books[2 + which] -= 1
            forget(records, ghosts, buckets, mask, record)
            queue = 1
        nodes[node * 12 + 8] = queue
        books[queue] += 1
    for i in range(count - 1, -1, -1):
        link_newest(nodes, used, entries[i] + 2)


@compiled
def _touch(nodes: Int32s, used: Int32s, entries: Int32s, count: int, books: Int64s) -> None:
    for i in range(count - 1, -1, -1):
        node = entries[i] + 2
        if nodes[node * 12 + 6] != 0:
            books[nodes[node * 12 + 8]] -= 1
            books[1] += 1
            renew(nodes, used, node, 1)


@compiled
def _remove(
    nodes: Int32s, used: Int32s, prints: Int64s, entries: Int32s, count: int, records: Int32s,
    ghosts: Int64s, buckets: Int32s, mask: int, books: Int64s,
) -> None:  # fmt: skip
    for i in range(count):
        node = entries[i] + 2
        if nodes[node * 12 + 6] == 0:
            continue
        queue = nodes[node * 12 + 8]
        leave(nodes, used, node)
        books[queue] -= 1
        name = prints[entries[i]]
        if name == 0:
            continue
        record = find(records, ghosts, buckets, mask, name)
        if record >= 0:
            books[2 + records[record * 4 + 3]] -= 1
            forget(records, ghosts, buckets, mask, record)
        remember(records, ghosts, buckets, mask, queue, name)
        books[2 + queue] += 1
        while books[2] > 0 and books[0] + books[2] > books[4]:
            forget(records, ghosts, buckets, mask, records[2])
            books[2] -= 1
        while books[3] > 0 and books[0] + books[1] + books[2] + books[3] > 2 * books[4]:
            forget(records, ghosts, buckets, mask, records[6])
            books[3] -= 1


@compiled
def _victims(nodes: Int32s, used: Int32s, pages: int, out: Int32s, room: int, books: Int64s) -> int:
    found = 0
    once = books[0]
    while pages > 0 and found < room:
        queue = 0 if once * 1024 > books[5] else 1
        node = oldest(nodes, used, queue)
        if node < 0:
            queue = 1 - queue
            node = oldest(nodes, used, queue)
            if node < 0:
                break
        take(nodes, used, node)
        if queue == 0:
            once -= 1
        out[found] = node - 2
        found += 1
        pages -= nodes[node * 12 + 7]
    restore(nodes, used, 2, out, found)
    out[room] = max(pages, 0)
    return found


class ARC:
    """Evict from the blocks used once or from the others, as those that come back say."""

    def __init__(self) -> None:
        self._queues = Queues(2, prints=True)
        self._ghosts = Ghosts(2)
        self._books: NDArray[np.int64] = np.zeros(6, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._queues.nbytes + self._ghosts.nbytes + self._books.nbytes

    def added(self, run: Run, now: float) -> None:
        """Take in blocks, as used often where they left not long ago."""
        queues, ghosts = self._queues, self._ghosts
        queues.fit(run.entries)
        _add(
            column(queues.nodes), column(queues.used), column64(queues.prints),
            column(run.entries), column64(run.prints), len(run.entries), queues.parent(run),
            pages_of(run.entry_bytes), column(ghosts.records), column64(ghosts.prints),
            column(ghosts.buckets), len(ghosts.buckets) - 1, column64(self._books),
        )  # fmt: skip

    def touched(self, run: Run, now: float) -> None:
        """Make blocks the newest of those used often."""
        queues, known = self._queues, self._queues.known(run.entries)
        nodes, used = column(queues.nodes), column(queues.used)
        _touch(nodes, used, column(known), len(known), column64(self._books))

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        self._queues.hold(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, the newest of their queue."""
        self._queues.release(entries, 0, recent=True)

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena, but for their prints."""
        queues, ghosts, known = self._queues, self._ghosts, self._queues.known(entries)
        ghosts.fit(int(self._books[2:4].sum()) + len(known))
        _remove(
            column(queues.nodes), column(queues.used), column64(queues.prints), column(known),
            len(known), column(ghosts.records), column64(ghosts.prints), column(ghosts.buckets),
            len(ghosts.buckets) - 1, column64(self._books),
        )  # fmt: skip

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates, leaves before their parents."""
        pages = pages_of(nbytes)
        queues, books = self._queues, self._books
        if pages > 0:
            books[CAPACITY] = max(books[ONCE] + books[OFTEN], books[CAPACITY] * 63 // 64)

        def step(pages: int, out: Int32s, room: int) -> int:
            nodes, used = column(queues.nodes), column(queues.used)
            return _victims(nodes, used, pages, column(out), room, column64(books))

        yield from queues.walk(pages, step)

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield nothing: no block has a time."""
        return iter(())
