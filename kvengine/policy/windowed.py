"""Windowed LRU (W-TinyLFU: Einziger, Friedman and Manes, ACM TOS 2017), leaf first.

New blocks enter a window. What leaves the window contends with the oldest block of the main part
(itself a queue on probation and a protected one): the one used more often stays. Uses are counted
in a sketch that forgets by halving.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.policy import Entries, Run, UnknownPolicy
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
    unlink,
)

# Victims that were promised wait in a queue of their own: asked again, the same come first.
WINDOW, PROBATION, PROTECTED, CONDEMNED = 0, 1, 2, 3
# Columns of the books: blocks in each queue, the capacity, the window, counted uses.
CAPACITY, WINDOW_BLOCKS, USES = 4, 5, 6
WINDOW_SHARE = 0.2
SKETCH_MIN = 1024


@compiled
def _frequency(sketch: Int32s, mask: int, name: int) -> int:
    one, two = sketch[(name >> 12) & mask], sketch[mask + 1 + ((name >> 34) & mask)]
    return int(min(one, two))


@compiled
def _count(sketch: Int32s, mask: int, names: Int64s, count: int, books: Int64s) -> None:
    for i in range(count):
        one, two = (names[i] >> 12) & mask, mask + 1 + ((names[i] >> 34) & mask)
        sketch[one] = min(15, sketch[one] + 1)
        sketch[two] = min(15, sketch[two] + 1)
    books[6] += count
    if books[6] > 10 * max(1, books[4]) and books[6] > mask:
        books[6] = 0
        for i in range(2 * mask + 2):
            sketch[i] >>= 1


@compiled
def _move(nodes: Int32s, used: Int32s, node: int, queue: int, books: Int64s) -> None:
    books[nodes[node * 12 + 8]] -= 1
    books[queue] += 1
    renew(nodes, used, node, queue)


@compiled
def _add(
    nodes: Int32s, used: Int32s, prints: Int64s, entries: Int32s, names: Int64s, count: int,
    above: int, pages: int, books: Int64s,
) -> None:  # fmt: skip
    for i in range(count):
        node = entries[i] + 4
        enter(nodes, node, above, pages, 0)
        above = node
        prints[entries[i]] = names[i] if len(names) == count else 0
        nodes[node * 12 + 8] = 0
    books[0] += count
    for i in range(count - 1, -1, -1):
        link_newest(nodes, used, entries[i] + 4)


@compiled
def _touch(nodes: Int32s, used: Int32s, entries: Int32s, count: int, books: Int64s) -> None:
    for i in range(count - 1, -1, -1):
        node = entries[i] + 4
        if nodes[node * 12 + 6] == 0:
            continue
        queue = nodes[node * 12 + 8]
        if queue == 3:
            queue = 0
        _move(nodes, used, node, 2 if queue == 1 else queue, books)
        while books[2] * 5 > max(1, books[4] - books[5]) * 4:
            lowest = nodes[2 * 12 + 1]
            if lowest == 2:
                break
            _move(nodes, used, lowest, 1, books)


@compiled
def _remove(nodes: Int32s, used: Int32s, entries: Int32s, count: int, books: Int64s) -> None:
    for i in range(count):
        node = entries[i] + 4
        if nodes[node * 12 + 6] != 0:
            books[nodes[node * 12 + 8]] -= 1
            leave(nodes, used, node)


@compiled
def _pick(
    nodes: Int32s, used: Int32s, prints: Int64s, sketch: Int32s, mask: int, books: Int64s
) -> int:
    # The next victim; a candidate of the window that has won moves to probation.
    node = oldest(nodes, used, 3)
    if node >= 0:
        return node
    rival = oldest(nodes, used, 1)
    if rival < 0:
        rival = oldest(nodes, used, 2)
    candidate = oldest(nodes, used, 0)
    if candidate < 0 or (rival >= 0 and books[0] <= books[5]):
        return rival
    if rival < 0:
        return candidate
    stays = _frequency(sketch, mask, prints[candidate - 4])
    if stays > _frequency(sketch, mask, prints[rival - 4]):
        _move(nodes, used, candidate, 1, books)
        return rival
    return candidate


@compiled
def _victims(
    nodes: Int32s, used: Int32s, prints: Int64s, sketch: Int32s, mask: int, pages: int,
    out: Int32s, room: int, books: Int64s,
) -> int:  # fmt: skip
    while books[0] > books[5] and books[1] + books[2] < books[4] - books[5]:
        node = nodes[1]
        if node == 0:
            break
        unlink(nodes, node)
        _move(nodes, used, node, 1, books)
    found = 0
    while pages > 0 and found < room:
        node = _pick(nodes, used, prints, sketch, mask, books)
        if node < 0:
            break
        take(nodes, used, node)
        books[nodes[node * 12 + 8]] -= 1
        books[3] += 1
        nodes[node * 12 + 8] = 3
        out[found] = node - 4
        found += 1
        pages -= nodes[node * 12 + 7]
    restore(nodes, used, 4, out, found)
    out[room] = max(pages, 0)
    return found


class WindowedLRU:
    """Evict what leaves the window, unless it was used more often than the oldest of the rest."""

    def __init__(self, window: float = WINDOW_SHARE) -> None:
        if not 0 < window < 1:
            raise UnknownPolicy(f"window: given {window!r}, expected a share between 0 and 1")
        self._window = window
        self._queues = Queues(4, prints=True)
        self._sketch: Int32s = np.zeros(2 * SKETCH_MIN, dtype=np.int32)
        self._books: NDArray[np.int64] = np.zeros(7, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._queues.nbytes + self._sketch.nbytes + self._books.nbytes

    def added(self, run: Run, now: float) -> None:
        """Take in blocks: the window."""
        queues = self._queues
        queues.fit(run.entries)
        _add(
            column(queues.nodes), column(queues.used), column64(queues.prints),
            column(run.entries), column64(run.prints), len(run.entries), queues.parent(run),
            pages_of(run.entry_bytes), column64(self._books),
        )  # fmt: skip

    def touched(self, run: Run, now: float) -> None:
        """Count uses, and make blocks the newest of their queue, or protected."""
        queues, known = self._queues, self._queues.known(run.entries)
        books = column64(self._books)
        half = len(self._sketch) // 2
        _count(column(self._sketch), half - 1, column64(run.prints), len(run.prints), books)
        _touch(column(queues.nodes), column(queues.used), column(known), len(known), books)

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        self._queues.hold(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, the newest of their queue."""
        self._queues.release(entries, 0, recent=True)

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        queues, known = self._queues, self._queues.known(entries)
        nodes, used = column(queues.nodes), column(queues.used)
        _remove(nodes, used, column(known), len(known), column64(self._books))

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates, leaves before their parents."""
        pages = pages_of(nbytes)
        queues, books = self._queues, self._books
        if pages > 0:
            books[CAPACITY] = max(int(books[:CAPACITY].sum()), books[CAPACITY] * 63 // 64)
            books[WINDOW_BLOCKS] = max(1, int(books[CAPACITY] * self._window))
            self._fit_sketch(int(books[CAPACITY]))

        def step(pages: int, out: Int32s, room: int) -> int:
            half = len(self._sketch) // 2
            return _victims(
                column(queues.nodes), column(queues.used), column64(queues.prints),
                column(self._sketch), half - 1, pages, column(out), room, column64(books),
            )  # fmt: skip

        yield from queues.walk(pages, step)

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield nothing: no block has a time."""
        return iter(())

    def _fit_sketch(self, capacity: int) -> None:
        half = len(self._sketch) // 2
        if capacity > half:  # doubling keeps each count reachable: the new half repeats the old
            self._sketch = np.repeat(self._sketch.reshape(2, 1, half), 2, axis=1).reshape(-1)
