"""S3-FIFO (Yang and others, SOSP 2023), leaf first: a small queue, a main one, and ghosts.

A block enters the small queue, a tenth of the memory. What was used twice before it comes to the
old end moves to the main queue; the rest leaves, and goes straight to main where it comes back
soon. In main a use buys another round. Uses move nothing.
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
    restore,
    take,
    unlink,
)

SMALL, MAIN = 0, 1
# Columns of the books: blocks in either queue, ghosts, the capacity.
GHOSTS, CAPACITY = 2, 3
SMALL_SHARE = 10


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
            forget(records, ghosts, buckets, mask, record)
            books[2] -= 1
            queue = 1
        nodes[node * 12 + 8] = queue
        books[queue] += 1
    for i in range(count - 1, -1, -1):
        link_newest(nodes, used, entries[i] + 2)


@compiled
def _touch(nodes: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count):
        node = entries[i] + 2
        if nodes[node * 12 + 6] != 0:
            nodes[node * 12 + 10] = min(3, nodes[node * 12 + 10] + 1)


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
        if queue == 1 or name == 0 or find(records, ghosts, buckets, mask, name) >= 0:
            continue
        remember(records, ghosts, buckets, mask, 0, name)
        books[2] += 1
        while books[2] > books[3]:
            forget(records, ghosts, buckets, mask, records[2])
            books[2] -= 1


@compiled
def _victims(nodes: Int32s, used: Int32s, pages: int, out: Int32s, room: int, books: Int64s) -> int:
    found = 0
    small = books[0]
    target = max(1, books[3] // 10)
    while pages > 0 and found < room:
        queue = 0 if small >= target else 1
        node = oldest(nodes, used, queue)
        if node < 0:
            queue = 1 - queue
            node = oldest(nodes, used, queue)
            if node < 0:
                break
        uses = nodes[node * 12 + 10]
        if uses > 1 - queue:
            unlink(nodes, node)
            nodes[node * 12 + 8] = 1
            nodes[node * 12 + 10] = uses - 1 if queue == 1 else 0
            link_newest(nodes, used, node)
            if queue == 0:
                small -= 1
                books[0] -= 1
                books[1] += 1
            continue
        take(nodes, used, node)
        if queue == 0:
            small -= 1
        out[found] = node - 2
        found += 1
        pages -= nodes[node * 12 + 7]
    restore(nodes, used, 2, out, found)
    out[room] = max(pages, 0)
    return found


class S3FIFO:
    """Evict what was not used twice while it passed the small queue."""

    def __init__(self) -> None:
        self._queues = Queues(2, prints=True)
        self._ghosts = Ghosts(1)
        self._books: NDArray[np.int64] = np.zeros(4, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._queues.nbytes + self._ghosts.nbytes + self._books.nbytes

    def added(self, run: Run, now: float) -> None:
        """Take in blocks: the small queue, or main where they left not long ago."""
        queues, ghosts = self._queues, self._ghosts
        queues.fit(run.entries)
        _add(
            column(queues.nodes), column(queues.used), column64(queues.prints),
            column(run.entries), column64(run.prints), len(run.entries), queues.parent(run),
            pages_of(run.entry_bytes), column(ghosts.records), column64(ghosts.prints),
            column(ghosts.buckets), len(ghosts.buckets) - 1, column64(self._books),
        )  # fmt: skip

    def touched(self, run: Run, now: float) -> None:
        """Count uses."""
        known = self._queues.known(run.entries)
        _touch(column(self._queues.nodes), column(known), len(known))

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        self._queues.hold(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, in their places."""
        self._queues.release(entries, 0, recent=False)

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena, but for their prints."""
        queues, ghosts, known = self._queues, self._ghosts, self._queues.known(entries)
        ghosts.fit(int(self._books[GHOSTS]) + len(known))
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
            books[CAPACITY] = max(books[SMALL] + books[MAIN], books[CAPACITY] * 63 // 64)

        def step(pages: int, out: Int32s, room: int) -> int:
            nodes, used = column(queues.nodes), column(queues.used)
            return _victims(nodes, used, pages, column(out), room, column64(books))

        yield from queues.walk(pages, step)

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield nothing: no block has a time."""
        return iter(())
