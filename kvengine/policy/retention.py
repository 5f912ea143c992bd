"""What callers asked for goes before what a policy thinks: priorities, times to live, hints.

A wrapper around any policy, put there by the store when retention is asked for the first time; it
knows the blocks that came after. Blocks above the usual level are held in the policy below, which
therefore never offers them; those below it are offered first. A block stands in `_ready`, by
level, while it is a candidate: marked, not held, and without a child here. What has outlived its
time to live has the level -1.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator

import numpy as np

from kvengine.policy import NO_PARENT, Entries, Policy, Run
from kvengine.policy.lru import LRU, PAGE_BYTES

OVER, LOWEST, USUAL, HIGHEST = -1, 0, 50, 100
HERE, HELD, HINT = 1, 2, 4
NEVER = float("inf")
WALK_MAX = 4096
ALARM_BYTES = 96  # a tuple of a time and an id, and its place
READY_BYTES = 96


class Retained:
    """See the module. `inner` decides among the blocks that nobody has said anything of."""

    def __init__(self, inner: Policy | None = None) -> None:
        self._inner: Policy = LRU() if inner is None else inner
        self._parent = array("i")
        self._parent_birth = array("i")
        self._birth = array("i")
        self._children = array("i")
        self._pages = array("i")
        self._flags = array("b")
        self._level = array("b")
        self._until = array("d")  # when the level ends
        self._over = array("d")  # when the time to live ends
        self._ready: dict[int, dict[int, None]] = {}
        self._alarms: list[tuple[float, int]] = []
        self._timed = 0  # ends that the columns name

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        columns = (self._parent, self._parent_birth, self._birth, self._children, self._pages)
        wide = sum(len(each) * each.itemsize for each in (*columns, self._until, self._over))
        ready = sum(len(each) for each in self._ready.values())
        narrow = len(self._flags) + len(self._level)
        more = ready * READY_BYTES + len(self._alarms) * ALARM_BYTES
        return self._inner.nbytes + wide + narrow + more

    # What callers ask for. Entries that are not known here are left alone.

    def keep(
        self, entries: Entries, new: Entries, level: int, until: float, over: float, now: float
    ) -> int:
        """Give blocks of a put a level until a time, and an end of life (NEVER: none).

        new: 1 for the blocks that the put brought. Those that others had put before are only ever
        kept better: a higher level, a later end of life if they have one. Returns how many are
        known.
        """
        self._ring(now)
        known = 0
        for entry, fresh in zip(entries.tolist(), new.tolist(), strict=True):
            if not self._here(entry):
                continue
            known += 1
            outlived = self._level[entry] == OVER
            if over != NEVER and (fresh or outlived or self._over[entry] != NEVER):
                before = self._over[entry]
                self._set_over(entry, over if before == NEVER else max(over, before))
                if outlived:
                    self._mark(entry, USUAL, NEVER)
            if level != USUAL and (fresh or level > self._level[entry] != OVER):
                self._mark(entry, level, until)
        return known

    def end(self, entries: Entries, now: float, *, branch: bool = False) -> int:
        """Let blocks of a prompt leave before all others, until they are used again.

        branch: only the last ones, that no other prompt continues. What a put has given a level
        above the usual keeps it. Returns how many are known.
        """
        self._ring(now)
        known = [entry for entry in entries.tolist() if self._here(entry)]
        for entry in reversed(known):
            if branch and self._children[entry] > (entry != known[-1]):
                break
            if self._flags[entry] & HINT or LOWEST < self._level[entry] <= USUAL:
                self._mark(entry, LOWEST, NEVER, HINT)
        return len(known)

    def expect(self, entries: Entries, until: float, now: float) -> int:
        """Keep blocks after all others until a time, or until they are used. See `end`."""
        self._ring(now)
        known = [entry for entry in entries.tolist() if self._here(entry)]
        for entry in known:
            if self._flags[entry] & HINT or OVER < self._level[entry] <= USUAL:
                self._mark(entry, HIGHEST, until, HINT)
        return len(known)

    # The protocol

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena."""
        self._inner.added(run, now)
        if not len(run.entries):
            return
        self._fit(int(run.entries.max()) + 1)
        above, pages = run.parent, -(-run.entry_bytes // PAGE_BYTES)
        for entry in run.entries.tolist():
            self._flags[entry] = HERE
            self._level[entry] = USUAL
            self._until[entry] = self._over[entry] = NEVER
            self._birth[entry] += 1
            self._children[entry], self._pages[entry] = 0, pages
            self._parent[entry] = NO_PARENT
            if self._here(above):
                self._parent[entry], self._parent_birth[entry] = above, self._birth[above]
                self._children[above] += 1
                self._settle(above)
            above = entry

    def touched(self, run: Run, now: float) -> None:
        """Note a use: hints are over, what a put has asked for is not."""
        for entry in run.entries.tolist():
            if self._here(entry) and self._flags[entry] & HINT and self._level[entry] != OVER:
                self._mark(entry, USUAL, NEVER)
        self._inner.touched(run, now)

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        for entry in entries.tolist():
            if self._here(entry):
                self._flags[entry] |= HELD
                self._settle(entry)
        self._inner.held(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, those above the usual level here alone."""
        below = np.ones(len(entries), dtype=np.bool_)
        for at, entry in enumerate(entries.tolist()):
            if self._here(entry):
                self._flags[entry] &= ~HELD
                self._settle(entry)
                below[at] = self._level[entry] <= USUAL
        self._inner.freed(entries if below.all() else np.ascontiguousarray(entries[below]))

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        for entry in entries.tolist():
            if not self._here(entry):
                continue
            self._set_level(entry, USUAL, NEVER)
            self._set_over(entry, NEVER)
            self._flags[entry] = 0
            above = self._above(entry)
            if above != NO_PARENT:
                self._children[above] -= 1
                self._settle(above)
        self._inner.removed(entries)

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield what was given a low level, then the policy's victims, then the high ones."""
        self._ring(now)
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
        self._ring(now)
        yield from self._marked(OVER, OVER + 1, 1 << 31)
        yield from self._inner.expired(now)

    # Inside

    def _here(self, entry: int) -> bool:
        return 0 <= entry < len(self._flags) and self._flags[entry] & HERE != 0

    def _above(self, entry: int) -> int:
        """Return the parent, NO_PARENT where it has gone (or another block has taken its id)."""
        above = self._parent[entry]
        if self._here(above) and self._birth[above] == self._parent_birth[entry]:
            return above
        return NO_PARENT

    def _size(self, entries: Entries) -> int:
        """Return the pages of blocks; of those that came before this did, at least."""
        return sum(self._pages[e] if self._here(e) else 1 for e in entries.tolist())

    def _fit(self, ids: int) -> None:
        if ids > len(self._flags):
            more = max(ids, len(self._flags) * 5 // 4) - len(self._flags)
            integers = (self._parent, self._parent_birth, self._birth, self._children, self._pages)
            for each in (*integers, self._flags, self._level):
                each.frombytes(bytes(more * each.itemsize))
            for times in (self._until, self._over):
                times.frombytes(bytes(more * times.itemsize))

    def _mark(self, entry: int, level: int, until: float, hint: int = 0) -> None:
        """Give a block another level; the policy below holds what is above the usual."""
        was_high = self._level[entry] > USUAL
        self._set_level(entry, level, until)
        self._flags[entry] = self._flags[entry] & ~HINT | hint
        self._settle(entry)
        if not self._flags[entry] & HELD and was_high != (level > USUAL):
            one = np.array([entry], dtype=np.int32)
            if level > USUAL:
                self._inner.held(one)
            else:
                self._inner.freed(one)

    def _set_level(self, entry: int, level: int, until: float) -> None:
        self._ready.get(self._level[entry], {}).pop(entry, None)
        self._level[entry] = level
        self._timed += (until != NEVER) - (self._until[entry] != NEVER)
        self._until[entry] = until
        self._alarm(until, entry)

    def _set_over(self, entry: int, over: float) -> None:
        self._timed += (over != NEVER) - (self._over[entry] != NEVER)
        self._over[entry] = over
        self._alarm(over, entry)

    def _alarm(self, when: float, entry: int) -> None:
        if when != NEVER:
            heapq.heappush(self._alarms, (when, entry))
        if len(self._alarms) > 2 * self._timed + 64:  # most of them are void
            live = {pair for pair in self._alarms if pair[0] in self._ends(pair[1])}
            self._alarms = sorted(live)

    def _ends(self, entry: int) -> tuple[float, float]:
        return (self._until[entry], self._over[entry])

    def _ring(self, now: float) -> None:
        """End the levels and the lives whose time has come."""
        while self._alarms and self._alarms[0][0] <= now:
            when, entry = heapq.heappop(self._alarms)
            if not self._here(entry):
                continue
            if self._over[entry] == when:
                self._set_over(entry, NEVER)
                self._mark(entry, OVER, NEVER)
            elif self._until[entry] == when:
                self._mark(entry, USUAL, NEVER)

    def _settle(self, entry: int) -> None:
        """Put a block among the candidates of its level, or take it out."""
        level = self._level[entry]
        if level == USUAL:
            return
        ready = self._ready.setdefault(level, {})
        if self._children[entry] or self._flags[entry] & HELD:
            ready.pop(entry, None)
        else:
            ready.setdefault(entry)
        if not ready:
            del self._ready[level]

    def _marked(self, first: int, stop: int, missing: int) -> Iterator[Entries]:
        """Yield candidates of levels first..stop, the lowest first, until enough pages."""
        while missing > 0:
            chosen = self._walk(first, stop, missing)
            if not len(chosen):
                return
            missing -= self._size(chosen)
            yield chosen
            if self._here(int(chosen[0])):
                return  # the caller took none: the same would come again

    def _walk(self, first: int, stop: int, missing: int) -> Entries:
        """Choose as if each one chosen had gone; ends where a parent of another rank comes free."""
        out: list[int] = []
        left: dict[int, int] = {}
        come: list[tuple[int, int]] = []  # parents that have come free
        for level in sorted(each for each in self._ready if first <= each < stop):
            waiting = iter(self._ready[level])
            while missing > 0 and len(out) < WALK_MAX:
                if come and come[0][0] <= level:
                    entry = heapq.heappop(come)[1]
                else:
                    entry = next(waiting, -1)
                if entry < 0:
                    break
                out.append(entry)
                missing -= self._pages[entry]
                above = self._above(entry)
                if above == NO_PARENT:
                    continue
                left[above] = left.get(above, self._children[above]) - 1
                if left[above] == 0 and not self._flags[above] & HELD:
                    if not first <= self._level[above] < stop:
                        missing = 0
                    heapq.heappush(come, (self._level[above], above))
        return np.array(out, dtype=np.int32)
