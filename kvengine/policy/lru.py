"""Least recently used, leaf first: a block leaves before the block that it continues.

A doubly linked list in columns, oldest first. A parent that the walk for victims meets is parked
outside the list (it is no candidate while a child is here) and comes back at the old end when its
last child goes, so a walk is paid for by what it evicts. Within a run the deepest block is the
oldest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.policy import NO_PARENT, Entries, Run

# Columns of a node. Node 0 is the ends of the list: its NEXT is the oldest, its PREV the newest;
# the node of entry e is e + 1.
PREV, NEXT, PARENT, PARENT_BIRTH, CHILDREN, BIRTH, STATUS, PAGES = 0, 1, 2, 3, 4, 5, 6, 7
WIDTH = 8
ABSENT, LINKED, PARKED, HELD = 0, 1, 2, 3
PAGE_BYTES = 4096
WALK_MAX = 4096


@compiled
def _unlink(nodes: Int32s, node: int) -> None:
    before, after = nodes[node * 8], nodes[node * 8 + 1]
    nodes[before * 8 + 1] = after
    nodes[after * 8] = before


@compiled
def _link_newest(nodes: Int32s, node: int) -> None:
    last = nodes[0]
    nodes[node * 8] = last
    nodes[node * 8 + 1] = 0
    nodes[last * 8 + 1] = node
    nodes[0] = node
    nodes[node * 8 + 6] = 1


@compiled
def _link_oldest(nodes: Int32s, node: int) -> None:
    first = nodes[1]
    nodes[node * 8] = 0
    nodes[node * 8 + 1] = first
    nodes[first * 8] = node
    nodes[1] = node
    nodes[node * 8 + 6] = 1


@compiled
def _parent(nodes: Int32s, node: int) -> int:
    # The parent's node, or 0 where it has gone (or another block has taken its id).
    parent = int(nodes[node * 8 + 2])
    if parent > 0 and nodes[parent * 8 + 6] != 0 and nodes[parent * 8 + 5] == nodes[node * 8 + 3]:
        return parent
    return 0


@compiled
def _add(nodes: Int32s, entries: Int32s, count: int, parent: int, pages: int) -> None:
    above = parent + 1
    for i in range(count):
        node = entries[i] + 1
        nodes[node * 8 + 2] = 0
        if above > 0 and nodes[above * 8 + 6] != 0:
            nodes[node * 8 + 2] = above
            nodes[node * 8 + 3] = nodes[above * 8 + 5]
            nodes[above * 8 + 4] += 1
        nodes[node * 8 + 4] = 0
        nodes[node * 8 + 5] += 1
        nodes[node * 8 + 6] = 3
        nodes[node * 8 + 7] = pages
        above = node
    for i in range(count - 1, -1, -1):
        _link_newest(nodes, entries[i] + 1)


@compiled
def _touch(nodes: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count - 1, -1, -1):
        node = entries[i] + 1
        status = nodes[node * 8 + 6]
        if status == 1:
            _unlink(nodes, node)
            _link_newest(nodes, node)
        elif status == 2:
            _link_newest(nodes, node)


@compiled
def _hold(nodes: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count):
        node = entries[i] + 1
        status = nodes[node * 8 + 6]
        if status == 1:
            _unlink(nodes, node)
        if status != 0:
            nodes[node * 8 + 6] = 3


@compiled
def _release(nodes: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count - 1, -1, -1):
        node = entries[i] + 1
        if nodes[node * 8 + 6] == 3:
            _link_newest(nodes, node)


@compiled
def _remove(nodes: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count):
        node = entries[i] + 1
        status = nodes[node * 8 + 6]
        if status == 0:
            continue
        if status == 1:
            _unlink(nodes, node)
        nodes[node * 8 + 6] = 0
        parent = _parent(nodes, node)
        if parent > 0:
            nodes[parent * 8 + 4] -= 1
            if nodes[parent * 8 + 4] == 0 and nodes[parent * 8 + 6] == 2:
                _link_oldest(nodes, parent)


@compiled
def _victims(nodes: Int32s, pages: int, out: Int32s, room: int) -> int:
    # Children are counted down as if the victims had gone, and put back at the end.
    found = 0
    node = nodes[1]
    while node != 0 and pages > 0 and found < room:
        after = nodes[node * 8 + 1]
        if nodes[node * 8 + 4] > 0:
            _unlink(nodes, node)
            nodes[node * 8 + 6] = 2
            node = after
            continue
        victim = node
        while victim > 0 and pages > 0 and found < room:
            out[found] = victim - 1
            found += 1
            pages -= nodes[victim * 8 + 7]
            victim = _parent(nodes, victim)
            if victim > 0:
                nodes[victim * 8 + 4] -= 1
                if nodes[victim * 8 + 4] > 0 or nodes[victim * 8 + 6] != 2:
                    victim = 0
        node = after
    for i in range(found):
        parent = _parent(nodes, out[i] + 1)
        if parent > 0:
            nodes[parent * 8 + 4] += 1
    out[room] = max(pages, 0)  # what is still missing
    return found


@compiled
def _replay(
    nodes: Int32s,
    paths: Int32s,
    offsets: Int64s,
    requests: int,
    capacity: int,
    score_from: int,
    out: Int32s,
) -> tuple[int, int]:
    hits, evictions, resident, room = 0, 0, 0, len(out) - 1
    for r in range(requests):
        first, total = offsets[r], int(offsets[r + 1] - offsets[r])
        path = paths[first : first + total]
        count = 0
        while count < total and nodes[(path[count] + 1) * 8 + 6] != 0:
            count += 1
        hits += count if r >= score_from else 0
        missing = total - count - (capacity - resident)
        _hold(nodes, path, count)
        while missing > 0:
            found = _victims(nodes, missing, out, min(missing, room))
            if found == 0:
                break
            _remove(nodes, out, found)
            evictions += found
            resident -= found
            missing -= found
        _release(nodes, path, count)
        fitting = int(min(total - count, capacity - resident))
        above = path[count - 1] if count > 0 else -1
        _add(nodes, path[count : count + fitting], fitting, above, 1)
        resident += fitting
    return hits, evictions


class LRU:
    """Evict the least recently used leaf."""

    def __init__(self) -> None:
        self._nodes = np.zeros(WIDTH, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._nodes.nbytes

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena, as used now."""
        self._fit(run.entries)
        pages = -(-run.entry_bytes // PAGE_BYTES)
        parent = run.parent if WIDTH * (run.parent + 2) <= len(self._nodes) else NO_PARENT
        _add(column(self._nodes), column(run.entries), len(run.entries), parent, pages)

    def touched(self, run: Run, now: float) -> None:
        """Make blocks the newest, the deepest of the run the oldest among them."""
        known = self._known(run.entries)
        _touch(column(self._nodes), column(known), len(known))

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        known = self._known(entries)
        _hold(column(self._nodes), column(known), len(known))

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, the newest of all."""
        known = self._known(entries)
        _release(column(self._nodes), column(known), len(known))

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        known = self._known(entries)
        _remove(column(self._nodes), column(known), len(known))

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates, the oldest first, leaves before their parents."""
        pages = -(-nbytes // PAGE_BYTES)
        room = min(max(1, pages), WALK_MAX)
        out = np.empty(room + 1, dtype=np.int32)
        while pages > 0:
            found = _victims(column(self._nodes), pages, column(out), room)
            if found == 0:
                return
            entries = out[:found].copy()
            pages = int(out[room])
            yield entries
            if self._nodes[WIDTH * (int(entries[0]) + 1) + STATUS] != ABSENT:
                return  # the caller took none: the same would come again

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield nothing: no block has a time."""
        return iter(())

    def replay(
        self,
        nodes: Int32s,
        offsets: Int64s,
        prints: Int64s,
        seconds: NDArray[np.float64],
        output_tokens: Int32s,
        stops: Int32s,
        block_tokens: int,
        capacity: int,
        score_from: int,
    ) -> tuple[int, int]:
        """Play a trace in one loop (`trace.simulate`). Returns hits and evictions."""
        self._fit(np.array([len(prints) - 1], dtype=np.int32))
        hits, evictions = _replay(
            column(self._nodes),
            column(nodes),
            column64(offsets),
            len(seconds),
            capacity,
            score_from,
            column(np.zeros(WALK_MAX + 1, dtype=np.int32)),
        )
        return int(hits), int(evictions)

    def _fit(self, entries: Entries) -> None:
        need = WIDTH * (int(entries.max(initial=0)) + 2)
        if need > len(self._nodes):
            size = max(need, WIDTH * (len(self._nodes) // WIDTH * 3 // 2))
            longer = np.zeros(size, dtype=np.int32)
            longer[: len(self._nodes)] = self._nodes
            self._nodes = longer

    def _known(self, entries: Entries) -> Entries:
        limit = len(self._nodes) // WIDTH - 1
        if len(entries) and int(entries.max()) >= limit:
            return np.ascontiguousarray(entries[entries < limit])
        return entries
