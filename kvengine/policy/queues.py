"""Queues of blocks in columns, from which the policies with more than one queue pick.

As in `lru`, a block waits in a doubly linked list, oldest first; one that the walk for victims
meets with children or a hold on it is parked outside, and comes back at the old end when it is a
candidate again. Here a node knows its queue, and a hold leaves it in its place, so that a queue may
be first in, first out as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from kvengine.compiled import Int32s, Int64s, column, compiled
from kvengine.policy import NO_PARENT, Entries, Run

# Columns of a node. The nodes 0..queues-1 are the ends of the queues: NEXT the oldest, PREV the
# newest; the node of entry e is e + queues. MARK is the policy's own.
PREV, NEXT, PARENT, PARENT_BIRTH, CHILDREN, BIRTH, STATUS, PAGES = 0, 1, 2, 3, 4, 5, 6, 7
QUEUE, LAST, MARK, HOLD = 8, 9, 10, 11
WIDTH = 12
ABSENT, LINKED, PARKED, TAKEN = 0, 1, 2, 3
PAGE_BYTES = 4096
WALK_MAX = 4096


@compiled
def unlink(nodes: Int32s, node: int) -> None:
    before, after = nodes[node * 12], nodes[node * 12 + 1]
    nodes[before * 12 + 1] = after
    nodes[after * 12] = before


@compiled
def link_newest(nodes: Int32s, used: Int32s, node: int) -> None:
    queue = nodes[node * 12 + 8]
    last = nodes[queue * 12]
    nodes[node * 12] = last
    nodes[node * 12 + 1] = queue
    nodes[last * 12 + 1] = node
    nodes[queue * 12] = node
    nodes[node * 12 + 6] = 1
    used[queue] = 1


@compiled
def link_oldest(nodes: Int32s, used: Int32s, node: int) -> None:
    queue = nodes[node * 12 + 8]
    first = nodes[queue * 12 + 1]
    nodes[node * 12] = queue
    nodes[node * 12 + 1] = first
    nodes[first * 12] = node
    nodes[queue * 12 + 1] = node
    nodes[node * 12 + 6] = 1
    used[queue] = 1


@compiled
def parent_of(nodes: Int32s, node: int) -> int:
    # The parent's node, or -1 where it has gone (or another block has taken its id).
    parent = int(nodes[node * 12 + 2])
    if parent >= 0 and nodes[parent * 12 + 6] != 0:
        if nodes[parent * 12 + 5] == nodes[node * 12 + 3]:
            return parent
    return -1


@compiled
def renew(nodes: Int32s, used: Int32s, node: int, queue: int) -> None:
    # To the new end of a queue. A node on hold goes where its hold ends.
    status = nodes[node * 12 + 6]
    if status == 1:
        unlink(nodes, node)
    nodes[node * 12 + 8] = queue
    if nodes[node * 12 + 11] == 0:
        link_newest(nodes, used, node)
    else:
        nodes[node * 12 + 6] = 2


@compiled
def enter(nodes: Int32s, node: int, above: int, pages: int, tick: int) -> None:
    # A new block under the node `above` (-1: none), parked until its policy links it.
    nodes[node * 12 + 2] = -1
    if above >= 0 and nodes[above * 12 + 6] != 0:
        nodes[node * 12 + 2] = above
        nodes[node * 12 + 3] = nodes[above * 12 + 5]
        nodes[above * 12 + 4] += 1
    nodes[node * 12 + 4] = 0
    nodes[node * 12 + 5] += 1
    nodes[node * 12 + 6] = 2
    nodes[node * 12 + 7] = pages
    nodes[node * 12 + 9] = tick
    nodes[node * 12 + 10] = 0
    nodes[node * 12 + 11] = 0


@compiled
def hold(nodes: Int32s, shift: int, entries: Int32s, count: int) -> None:
    for i in range(count):
        node = entries[i] + shift
        if nodes[node * 12 + 6] != 0:
            nodes[node * 12 + 11] = 1


@compiled
def release(
    nodes: Int32s, used: Int32s, shift: int, entries: Int32s, count: int, tick: int, recent: int
) -> None:
    # `recent`: to the new end of its queue; 0: back to its place, or to the old end.
    for i in range(count - 1, -1, -1):
        node = entries[i] + shift
        status = nodes[node * 12 + 6]
        if status == 0 or nodes[node * 12 + 11] == 0:
            continue
        nodes[node * 12 + 11] = 0
        if recent != 0:
            if status == 1:
                unlink(nodes, node)
            nodes[node * 12 + 9] = tick
            link_newest(nodes, used, node)
        elif status == 2 and nodes[node * 12 + 4] == 0:
            link_oldest(nodes, used, node)


@compiled
def leave(nodes: Int32s, used: Int32s, node: int) -> None:
    # One block goes; a parent that was parked for its children only becomes a candidate.
    if nodes[node * 12 + 6] == 1:
        unlink(nodes, node)
    parent = parent_of(nodes, node)
    nodes[node * 12 + 6] = 0
    if parent >= 0:
        nodes[parent * 12 + 4] -= 1
        if nodes[parent * 12 + 4] == 0 and nodes[parent * 12 + 6] == 2:
            if nodes[parent * 12 + 11] == 0:
                link_oldest(nodes, used, parent)


@compiled
def oldest(nodes: Int32s, used: Int32s, queue: int) -> int:
    # The oldest candidate of a queue, -1 where there is none.
    while True:
        node = int(nodes[queue * 12 + 1])
        if node == queue:
            used[queue] = 0
            return -1
        if nodes[node * 12 + 4] == 0 and nodes[node * 12 + 11] == 0:
            return node
        unlink(nodes, node)
        nodes[node * 12 + 6] = 2


@compiled
def take(nodes: Int32s, used: Int32s, node: int) -> None:
    # As if a victim had gone, until `restore`.
    unlink(nodes, node)
    nodes[node * 12 + 6] = 3
    parent = parent_of(nodes, node)
    if parent >= 0:
        nodes[parent * 12 + 4] -= 1
        if nodes[parent * 12 + 4] == 0 and nodes[parent * 12 + 6] == 2:
            if nodes[parent * 12 + 11] == 0:
                link_oldest(nodes, used, parent)


@compiled
def restore(nodes: Int32s, used: Int32s, shift: int, out: Int32s, found: int) -> None:
    for i in range(found - 1, -1, -1):
        node = out[i] + shift
        parent = parent_of(nodes, node)
        if parent >= 0:
            nodes[parent * 12 + 4] += 1
        link_oldest(nodes, used, node)


@compiled
def start(nodes: Int32s, shift: int) -> None:
    for queue in range(shift):
        nodes[queue * 12] = queue
        nodes[queue * 12 + 1] = queue


class Queues:
    """The columns of a policy's nodes, grown as ids appear. `prints`: a block's print is kept."""

    def __init__(self, count: int, prints: bool = False) -> None:
        self.shift = count
        self.nodes: Int32s = np.zeros(WIDTH * count, dtype=np.int32)
        self.used: Int32s = np.zeros(count, dtype=np.int32)
        self.prints: Int64s = np.zeros(0, dtype=np.int64)
        self._with_prints = prints
        start(column(self.nodes), count)

    @property
    def nbytes(self) -> int:
        """Bytes in the columns."""
        return self.nodes.nbytes + self.used.nbytes + self.prints.nbytes

    def fit(self, entries: Entries) -> None:
        """Make room for the highest id."""
        ids = int(entries.max(initial=-1)) + 1
        have = len(self.nodes) // WIDTH - self.shift
        if ids > have:
            size = max(ids, have * 5 // 4)
            longer = np.zeros(WIDTH * (size + self.shift), dtype=np.int32)
            longer[: len(self.nodes)] = self.nodes
            self.nodes = longer
            if self._with_prints:
                prints = np.zeros(size, dtype=np.int64)
                prints[: len(self.prints)] = self.prints
                self.prints = prints

    def known(self, entries: Entries) -> Entries:
        """Drop ids that were never here."""
        limit = len(self.nodes) // WIDTH - self.shift
        if len(entries) and int(entries.max()) >= limit:
            return np.ascontiguousarray(entries[entries < limit])
        return entries

    def parent(self, run: Run) -> int:
        """Return the node of a run's parent, -1 where it has none."""
        if run.parent == NO_PARENT or WIDTH * (run.parent + self.shift) >= len(self.nodes):
            return -1
        return run.parent + self.shift

    def present(self, entry: int) -> bool:
        """Say whether a block is here."""
        return bool(self.nodes[WIDTH * (entry + self.shift) + STATUS] != ABSENT)

    def walk(self, pages: int, step: Callable[[int, Int32s, int], int]) -> Iterator[Entries]:
        """Yield victims, until there are enough pages of them or the caller takes none.

        `step(pages, out, room)` finds some, writes them to the start of `out` and what is still
        missing to out[room], and returns how many there are.
        """
        room = min(max(1, pages), WALK_MAX)
        out = np.empty(room + 1, dtype=np.int32)
        while pages > 0:
            found = step(pages, out, room)
            if found == 0:
                return
            entries = out[:found].copy()
            pages = int(out[room])
            yield entries
            if self.present(int(entries[0])):
                return  # the caller took none: the same would come again

    def hold(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        known = self.known(entries)
        hold(column(self.nodes), self.shift, column(known), len(known))

    def release(self, entries: Entries, tick: int, recent: bool) -> None:
        """End holds; `recent` moves the blocks to the new end."""
        known = self.known(entries)
        release(
            column(self.nodes), column(self.used), self.shift, column(known), len(known), tick,
            int(recent),
        )  # fmt: skip


def pages_of(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES)
