"""What callers asked for goes before what a policy thinks: priorities, times to live, hints.

A wrapper around any policy, put there by the store when retention is asked for the first time; it
knows the blocks that came after. Blocks above the usual level are held in the policy below, which
therefore never offers them; those below it are offered first. A block waits in the list of its
level while it is a candidate: marked, not held, and without a child here. What has outlived its
time to live has the level -1. Which level or life ends next is known by a heap of alarms, one for
each block that has an end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.policy import NO_PARENT, Entries, Policy, Run
from kvengine.policy.lru import LRU, PAGE_BYTES
from kvengine.policy.tournament import dismiss, enrol

OVER, LOWEST, USUAL, HIGHEST = -1, 0, 50, 100
HERE, HELD, HINT, WAITS = 1, 2, 4, 8
NEVER = float("inf")
WALK_MAX = 4096
TICKS = 16  # a second; ends are ticks since the first time seen
NO_END = 2**31 - 1
# Columns of a node. The nodes 0..LEVELS-1 are the ends of the lists by level, the lowest first:
# NEXT the oldest, PREV the newest; the node of entry e is e + LEVELS.
PREV, NEXT, PARENT, PARENT_BIRTH, BIRTH, CHILDREN, PAGES, FLAGS = 0, 1, 2, 3, 4, 5, 6, 7
LEVEL, UNTIL, LIFE = 8, 9, 10
WIDTH = 11
LEVELS = HIGHEST - OVER + 1


@compiled
def _leave(nodes: Int32s, node: int) -> None:
    before, after = nodes[node * 11], nodes[node * 11 + 1]
    nodes[before * 11 + 1] = after
    nodes[after * 11] = before
    nodes[node * 11 + 7] &= ~8


@compiled
def _wait(nodes: Int32s, node: int, oldest: bool) -> None:
    # At the end of the list of its level, or before all others in it.
    end = int(nodes[node * 11 + 8]) + 1
    before = end if oldest else int(nodes[end * 11])
    after = int(nodes[before * 11 + 1])
    nodes[node * 11] = before
    nodes[node * 11 + 1] = after
    nodes[before * 11 + 1] = node
    nodes[after * 11] = node
    nodes[node * 11 + 7] |= 8


@compiled
def _settle(nodes: Int32s, node: int) -> None:
    # Put a block among the candidates of its level, or take it out.
    flags = nodes[node * 11 + 7]
    ready = nodes[node * 11 + 8] != 50 and flags & 2 == 0 and nodes[node * 11 + 5] == 0
    if ready and flags & 8 == 0:
        _wait(nodes, node, False)
    elif not ready and flags & 8 != 0:
        _leave(nodes, node)


@compiled
def _above(nodes: Int32s, node: int) -> int:
    # The parent's node, -1 where it has gone (or another block has taken its id).
    above = int(nodes[node * 11 + 2])
    if above >= 0 and nodes[above * 11 + 7] & 1 != 0:
        if nodes[above * 11 + 4] == nodes[node * 11 + 3]:
            return above
    return -1


@compiled
def _alarm(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, node: int
) -> int:
    # To the earlier of the two ends of a block. Returns how many alarms there are.
    end = min(int(nodes[node * 11 + 9]), int(nodes[node * 11 + 10]))
    entry = node - 102
    if end != 2147483647:
        return enrol(heads, players, places, count, entry, end)
    if places[entry] >= 0:
        enrol(heads, players, places, count, entry, -1)
        return dismiss(heads, players, places, count)
    return count


@compiled
def _mark(nodes: Int32s, node: int, level: int, until: int, hint: int) -> int:
    # Gives a block another level. Returns 1 where the policy below is to hold it, -1 where it is to
    # let it go, 0 where nothing has changed for it.
    was = nodes[node * 11 + 8] > 50
    if nodes[node * 11 + 7] & 8 != 0:
        _leave(nodes, node)
    nodes[node * 11 + 8] = level
    nodes[node * 11 + 9] = until
    nodes[node * 11 + 7] = (nodes[node * 11 + 7] & ~4) | hint
    _settle(nodes, node)
    if nodes[node * 11 + 7] & 2 != 0 or was == (level > 50):
        return 0
    return -1 if was else 1


@compiled
def _ring(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, now: int,
    out: Int32s,
) -> tuple[int, int]:  # fmt: skip
    # Ends the levels and the lives whose time has come. Writes the entries to let go in the policy
    # below; stops where there is no room for more of them. Returns alarms left, and how many.
    lowered = 0
    while count > 0 and heads[0] <= now and lowered < len(out):
        entry = int(players[0])
        node = entry + 102
        level = 50
        if nodes[node * 11 + 10] <= now:
            nodes[node * 11 + 10] = 2147483647
            level = -1
        if _mark(nodes, node, level, 2147483647, 0) < 0:
            out[lowered] = entry
            lowered += 1
        count = _alarm(nodes, heads, players, places, count, node)
    return count, lowered


@compiled
def _keep(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, ids: int,
    entries: Int32s, new: Int32s, total: int, level: int, until: int, over: int, out: Int32s,
) -> tuple[int, int, int]:  # fmt: skip
    # Returns alarms, how many are known, and how many entries the policy below is to hold. A block
    # only ever comes above the usual level here, or was there and stays.
    known, raised = 0, 0
    for i in range(total):
        entry = int(entries[i])
        node = entry + 102
        if entry < 0 or entry >= ids or nodes[node * 11 + 7] & 1 == 0:
            continue
        known += 1
        fresh = new[i] != 0
        outlived = nodes[node * 11 + 8] == -1
        life = nodes[node * 11 + 10]
        if over != 2147483647 and (fresh or outlived or life != 2147483647):
            nodes[node * 11 + 10] = over if life == 2147483647 else max(over, int(life))
            if outlived:
                _mark(nodes, node, 50, 2147483647, 0)
        before = nodes[node * 11 + 8]
        if level != 50 and (fresh or (level > before and before != -1)):
            step = _mark(nodes, node, level, until, 0)
            if step != 0:
                out[raised] = entry if step > 0 else -1 - entry
                raised += 1
        count = _alarm(nodes, heads, players, places, count, node)
    return count, known, raised


@compiled
def _hint(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, ids: int,
    entries: Int32s, total: int, level: int, until: int, branch: bool, out: Int32s,
) -> tuple[int, int, int]:  # fmt: skip
    # From the end of the prompt on. As _keep.
    known, changed, last, open_ = 0, 0, -1, True
    for i in range(total - 1, -1, -1):
        entry = int(entries[i])
        node = entry + 102
        if entry < 0 or entry >= ids or nodes[node * 11 + 7] & 1 == 0:
            continue
        known += 1
        if last < 0:
            last = entry
        if branch and nodes[node * 11 + 5] > (0 if entry == last else 1):
            open_ = False
        before = nodes[node * 11 + 8]
        lowest = 0 if level == 0 else -1
        if open_ and (nodes[node * 11 + 7] & 4 != 0 or (lowest < before and before <= 50)):
            step = _mark(nodes, node, level, until, 4)
            if step != 0:
                out[changed] = entry if step > 0 else -1 - entry
                changed += 1
            count = _alarm(nodes, heads, players, places, count, node)
    return count, known, changed


@compiled
def _touch(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, ids: int,
    entries: Int32s, total: int, out: Int32s,
) -> tuple[int, int]:  # fmt: skip
    # Hints are over. Returns alarms, and how many entries the policy below is to let go.
    lowered = 0
    for i in range(total):
        entry = int(entries[i])
        node = entry + 102
        if entry < 0 or entry >= ids or nodes[node * 11 + 7] & 5 != 5:
            continue
        if nodes[node * 11 + 8] != -1:
            if _mark(nodes, node, 50, 2147483647, 0) < 0:
                out[lowered] = entry
                lowered += 1
            count = _alarm(nodes, heads, players, places, count, node)
    return count, lowered


@compiled
def _add(nodes: Int32s, entries: Int32s, total: int, above: int, pages: int) -> None:
    for i in range(total):
        node = entries[i] + 102
        nodes[node * 11 + 2] = -1
        nodes[node * 11 + 4] += 1
        nodes[node * 11 + 5] = 0
        nodes[node * 11 + 6] = pages
        nodes[node * 11 + 7] = 1
        nodes[node * 11 + 8] = 50
        nodes[node * 11 + 9] = nodes[node * 11 + 10] = 2147483647
        if above >= 0 and nodes[above * 11 + 7] & 1 != 0:
            nodes[node * 11 + 2] = above
            nodes[node * 11 + 3] = nodes[above * 11 + 4]
            nodes[above * 11 + 5] += 1
            _settle(nodes, above)
        above = node


@compiled
def _hold(nodes: Int32s, ids: int, entries: Int32s, total: int) -> None:
    for i in range(total):
        node = entries[i] + 102
        if entries[i] < ids and nodes[node * 11 + 7] & 1 != 0:
            nodes[node * 11 + 7] |= 2
            _settle(nodes, node)


@compiled
def _free(nodes: Int32s, ids: int, entries: Int32s, total: int, out: Int32s) -> int:
    # Writes the entries that the policy below may have back.
    found = 0
    for i in range(total):
        node = entries[i] + 102
        high = False
        if entries[i] < ids and nodes[node * 11 + 7] & 1 != 0:
            nodes[node * 11 + 7] &= ~2
            _settle(nodes, node)
            high = nodes[node * 11 + 8] > 50
        if not high:
            out[found] = entries[i]
            found += 1
    return found


@compiled
def _remove(
    nodes: Int32s, heads: Int64s, players: Int32s, places: Int32s, count: int, ids: int,
    entries: Int32s, total: int,
) -> int:  # fmt: skip
    for i in range(total):
        node = entries[i] + 102
        if entries[i] >= ids or nodes[node * 11 + 7] & 1 == 0:
            continue
        if nodes[node * 11 + 7] & 8 != 0:
            _leave(nodes, node)
        nodes[node * 11 + 9] = nodes[node * 11 + 10] = 2147483647
        count = _alarm(nodes, heads, players, places, count, node)
        nodes[node * 11 + 7] = 0
        above = _above(nodes, node)
        if above >= 0:
            nodes[above * 11 + 5] -= 1
            _settle(nodes, above)
    return count


@compiled
def _walk(nodes: Int32s, first: int, stop: int, pages: int, out: Int32s, room: int) -> int:
    # Chooses candidates of levels first..stop, the lowest first, as if each one chosen had gone;
    # ends where a parent of another rank comes free.
    found, level, taking = 0, first, True
    while taking and pages > 0 and found < room and level < stop:
        node = int(nodes[(level + 1) * 11 + 1])
        if node == level + 1:
            level += 1
            continue
        _leave(nodes, node)
        out[found] = node - 102
        found += 1
        pages -= nodes[node * 11 + 6]
        above = _above(nodes, node)
        if above >= 0:
            nodes[above * 11 + 5] -= 1
            if nodes[above * 11 + 5] == 0 and nodes[above * 11 + 7] & 2 == 0:
                rank = int(nodes[above * 11 + 8])
                taking = first <= rank and rank < stop
                if rank != 50:
                    _wait(nodes, above, True)
                level = min(level, rank) if taking else level
    for i in range(found - 1, -1, -1):
        node = out[i] + 102
        _wait(nodes, node, True)
        above = _above(nodes, node)
        if above >= 0:
            nodes[above * 11 + 5] += 1
            _settle(nodes, above)
    return found


@compiled
def _pages(nodes: Int32s, ids: int, entries: Int32s, total: int) -> int:
    # Of those that came before this did: one each, at least.
    pages = 0
    for i in range(total):
        node = entries[i] + 102
        known = entries[i] < ids and nodes[node * 11 + 7] & 1 != 0
        pages += int(nodes[node * 11 + 6]) if known else 1
    return pages


class Retained:
    """See the module. `inner` decides among the blocks that nobody has said anything of."""

    def __init__(self, inner: Policy | None = None) -> None:
        self._inner: Policy = LRU() if inner is None else inner
        self._nodes: Int32s = np.zeros(WIDTH * LEVELS, dtype=np.int32)
        for end in range(LEVELS):
            self._nodes[WIDTH * end + PREV] = self._nodes[WIDTH * end + NEXT] = end
        self._ids = 0
        self._heads: Int64s = np.zeros(0, dtype=np.int64)
        self._players: Int32s = np.zeros(0, dtype=np.int32)
        self._places: Int32s = np.zeros(0, dtype=np.int32)
        self._alarms = 0
        self._start: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        heap = self._heads.nbytes + self._players.nbytes + self._places.nbytes
        return self._inner.nbytes + self._nodes.nbytes + heap

    # What callers ask for. Entries that are not known here are left alone.

    def keep(
        self, entries: Entries, new: Entries, level: int, until: float, over: float, now: float
    ) -> int:
        """Give blocks of a put a level until a time, and an end of life (NEVER: none).

        new: 1 for the blocks that the put brought. Those that others had put before are only ever
        kept better: a higher level, a later end of life if they have one. Returns how many are
        known.
        """
        self._ring_at(now)
        out = self._room(entries)
        self._alarms, known, changed = _keep(
            *self._columns(), column(entries), column(new), len(entries), level,
            self._tick(until, now), self._tick(over, now), column(out),
        )  # fmt: skip
        self._tell(out[:changed])
        return known

    def end(self, entries: Entries, now: float, *, branch: bool = False) -> int:
        """Let blocks of a prompt leave before all others, until they are used again.

        branch: only the last ones, that no other prompt continues. What a put has given a level
        above the usual keeps it. Returns how many are known.
        """
        return self._hinted(entries, LOWEST, NEVER, branch, now)

    def expect(self, entries: Entries, until: float, now: float) -> int:
        """Keep blocks after all others until a time, or until they are used. See `end`."""
        return self._hinted(entries, HIGHEST, until, False, now)

    # The protocol

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena."""
        self._inner.added(run, now)
        if not len(run.entries):
            return
        self._fit(int(run.entries.max()) + 1)
        above = run.parent + LEVELS if NO_PARENT < run.parent < self._ids else -1
        pages = -(-run.entry_bytes // PAGE_BYTES)
        _add(column(self._nodes), column(run.entries), len(run.entries), above, pages)

    def touched(self, run: Run, now: float) -> None:
        """Note a use: hints are over, what a put has asked for is not."""
        out = self._room(run.entries)
        self._alarms, lowered = _touch(
            *self._columns(), column(run.entries), len(run.entries), column(out)
        )
        if lowered:
            self._inner.freed(out[:lowered])
        self._inner.touched(run, now)

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        _hold(column(self._nodes), self._ids, column(entries), len(entries))
        self._inner.held(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, those above the usual level here alone."""
        out = np.empty(len(entries), dtype=np.int32)
        below = _free(column(self._nodes), self._ids, column(entries), len(entries), column(out))
        self._inner.freed(entries if below == len(entries) else out[:below])

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        self._alarms = _remove(*self._columns(), column(entries), len(entries))
        self._inner.removed(entries)

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield what was given a low level, then the policy's victims, then the high ones."""
        self._ring_at(now)
        missing = -(-nbytes // PAGE_BYTES)
        while missing > 0:
            before = missing
            for chosen in self._marked(OVER, USUAL, missing):
                missing -= self._size(chosen)
                yield chosen
            if missing > 0:
                for chosen in self._inner.victims(missing * PAGE_BYTES, now, incoming):
                    missing -= self._size(chosen)
                    yield chosen
            if missing <= 0 or any(True for _ in self._inner.victims(1, now)):
                return  # enough, or the policy would rather not
            for chosen in self._marked(USUAL + 1, HIGHEST + 1, missing):
                missing -= self._size(chosen)
                yield chosen
                break  # a parent of the usual level may have come free
            if missing == before or (len(chosen) and self._here(int(chosen[0]))):
                return

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield the blocks whose time is over, as `victims` does."""
        self._ring_at(now)
        yield from self._marked(OVER, OVER + 1, 1 << 31)
        yield from self._inner.expired(now)

    def outlived(self, entries: Entries) -> NDArray[np.bool_]:
        """Say whose time to live is over, also of those that are held or have children."""
        if not self._ids:
            return np.zeros(len(entries), dtype=np.bool_)
        known = entries < self._ids
        nodes = self._nodes.reshape(-1, WIDTH)[np.where(known, entries, 0) + LEVELS]
        over: NDArray[np.bool_] = (nodes[:, FLAGS] & HERE != 0) & (nodes[:, LEVEL] == OVER)
        return known & over

    # Inside

    def _columns(self) -> tuple[Int32s, Int64s, Int32s, Int32s, int, int]:
        return (
            column(self._nodes), column64(self._heads), column(self._players),
            column(self._places), self._alarms, self._ids,
        )  # fmt: skip

    def _here(self, entry: int) -> bool:
        known = 0 <= entry < self._ids
        return known and bool(self._nodes[WIDTH * (entry + LEVELS) + FLAGS] & HERE)

    def _size(self, entries: Entries) -> int:
        """Return the pages of blocks; of those that came before this did, at least."""
        return _pages(column(self._nodes), self._ids, column(entries), len(entries))

    def _fit(self, ids: int) -> None:
        if ids > self._ids:
            self._ids = max(ids, self._ids * 5 // 4)
            self._nodes = _longer(self._nodes, WIDTH * (self._ids + LEVELS), 0)
            self._places = _longer(self._places, self._ids, -1)

    def _room(self, entries: Entries) -> Entries:
        """Return room for as many entries, after making it for as many alarms."""
        most = min(self._ids, self._alarms + len(entries))
        if most > len(self._players):
            size = min(self._ids, max(most, len(self._players) * 3 // 2))
            self._heads = _longer64(self._heads, size)
            self._players = _longer(self._players, size, 0)
        return np.empty(len(entries), dtype=np.int32)

    def _tick(self, time: float, now: float) -> int:
        """Return the tick at which a time has come; NO_END for what is far away."""
        if self._start is None:
            self._start = now
        if time == NEVER:
            return NO_END
        return min(math.ceil((time - self._start) * TICKS), NO_END - 1)

    def _ring_at(self, now: float) -> None:
        """End the levels and the lives whose time has come."""
        if not self._alarms or self._start is None:
            return
        tick = math.floor((now - self._start) * TICKS)
        out = np.empty(min(self._alarms, WALK_MAX), dtype=np.int32)
        lowered = len(out)
        while lowered == len(out) and self._alarms:
            nodes, heads, players, places, count, _ = self._columns()
            self._alarms, lowered = _ring(nodes, heads, players, places, count, tick, column(out))
            if lowered:
                self._inner.freed(out[:lowered])

    def _hinted(self, entries: Entries, level: int, until: float, branch: bool, now: float) -> int:
        self._ring_at(now)
        out = self._room(entries)
        self._alarms, known, changed = _hint(
            *self._columns(), column(entries), len(entries), level, self._tick(until, now), branch,
            column(out),
        )  # fmt: skip
        self._tell(out[:changed][::-1])
        return known

    def _tell(self, changed: Entries) -> None:
        """Have the policy below hold entries, and let go those that are written as -1 - entry."""
        raised = np.ascontiguousarray(changed[changed >= 0])
        lowered = np.ascontiguousarray(-1 - changed[changed < 0])
        if len(raised):
            self._inner.held(raised)
        if len(lowered):
            self._inner.freed(lowered)

    def _marked(self, first: int, stop: int, missing: int) -> Iterator[Entries]:
        """Yield candidates of levels first..stop, the lowest first, until enough pages."""
        room = min(max(1, missing), WALK_MAX)
        out = np.empty(room, dtype=np.int32)
        while missing > 0:
            found = _walk(column(self._nodes), first, stop, missing, column(out), room)
            if not found:
                return
            chosen = out[:found].copy()
            missing -= self._size(chosen)
            yield chosen
            if self._here(int(chosen[0])):
                return  # the caller took none: the same would come again


def _longer(array: Int32s, size: int, fill: int) -> Int32s:
    longer = np.full(size, fill, dtype=np.int32)
    longer[: len(array)] = array
    return longer


def _longer64(array: Int64s, size: int) -> NDArray[np.int64]:
    longer = np.zeros(size, dtype=np.int64)
    longer[: len(array)] = array
    return longer
