"""Blocks that several ranks fill together: complete, or nothing.

    filling  →  whole   every part of this fill was committed: the block may be seen
             →  void    a part was given up, or missing at the deadline: the block never is

A group is the ranks that name the same token. Whoever asks first opens a fill of a block, with the
parts that it has; the others join with theirs. All parts of it carry the group's fill id, and each
is claimed by one rank. A void block's slot may still be written by ranks that have not said how it
went: it is over when the last of them has. A group does not try a block again that it gave up: some
of its ranks would not know. Pure: no clock, no lock, no bytes; the store calls, under its lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s
from kvengine.index import grown

Bools = NDArray[np.bool_]
FILL_BYTES = 16
OPENINGS_MAX = 1 << 14
GIVEN_UP_MAX = 1 << 16


@dataclass(eq=False)
class Group:
    """Ranks that fill together: what their frames carry, what they fill, and try no more."""

    token: bytes
    fill: bytes
    openings: set[int] = field(default_factory=set)
    given_up: dict[bytes, None] = field(default_factory=dict)


@dataclass(eq=False)
class Opening:
    """Blocks whose fill began at once. `left` of them are still filling."""

    group: Group
    ids: Int32s
    left: int
    deadline: float


class Settled(NamedTuple):
    """What has become of blocks: `whole` says which of those asked about, the rest are ids.

    `void`: not to be seen from now on. `over`: void ones, now or before, that nobody writes.
    """

    whole: Bools
    void: Int32s
    over: Int32s


class Fills:
    """Fills under way, by the store's ids of blocks. Deadlines do not decrease.

    An id is this object's from `open` until it is whole or over. `name` gives the keys of ids.
    """

    def __init__(
        self,
        name: Callable[[Int32s], Sequence[bytes]],
        draw: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._name = name
        self._draw = draw
        self._groups: dict[bytes, Group] = {}
        self._openings: dict[int, Opening] = {}  # in order of deadline
        self._last = 0
        self.filling = 0
        self.late = 0  # void, and not over
        self._opening = np.zeros(0, dtype=np.int64)  # 0: not filling
        self._writers = np.zeros(0, dtype=np.int32)
        self._missing = np.zeros(0, dtype=np.uint64)  # parts that are not committed
        self._free = np.zeros(0, dtype=np.uint64)  # parts that nobody has claimed

    @property
    def crowded(self) -> bool:
        """Whether too many fills are under way for another."""
        return len(self._openings) >= OPENINGS_MAX

    def fill(self, token: bytes) -> bytes:
        """Return the id that a group's frames carry; empty where it fills nothing."""
        group = self._groups.get(token)
        return group.fill if group else b""

    def given_up(self, token: bytes) -> dict[bytes, None]:
        """Return the keys that a group tries no more."""
        group = self._groups.get(token)
        return group.given_up if group else {}

    def deadline(self, ids: Int32s) -> float:
        """Return when the first of some blocks that are filling becomes void."""
        return min(self._openings[at].deadline for at in set(self._opening[ids].tolist()))

    def open(
        self,
        token: bytes,
        ids: Int32s,
        whole: int,
        parts: int,
        deadline: float,
        refused: Sequence[bytes] = (),
    ) -> None:
        """Begin to fill blocks that nobody fills, by one who claims `parts` of the `whole`.

        Both are a bit for each part. refused: keys that the group is not to try.
        """
        if not len(ids) and not refused:
            return
        group = self._groups.get(token)
        if group is None:
            group = self._groups[token] = Group(token, self._draw(FILL_BYTES))
        _give_up(group, refused)
        self._last += 1
        group.openings.add(self._last)
        self._openings[self._last] = Opening(group, ids, len(ids), deadline)
        if len(ids):
            self._reach(int(ids.max()) + 1)
            self._opening[ids], self._writers[ids] = self._last, 1
            self._missing[ids], self._free[ids] = whole, whole & ~parts
            self.filling += len(ids)

    def join(self, token: bytes, ids: Int32s, parts: int) -> Bools:
        """Claim parts of blocks that the group fills; say of which. A part is claimed once."""
        group = self._groups.get(token)
        if group is None or not len(self._opening):
            return np.zeros(len(ids), dtype=np.bool_)
        known = (ids >= 0) & (ids < len(self._opening))
        at = np.where(known, ids, 0)
        can = known & np.isin(self._opening[at], list(group.openings))
        can &= self._free[at] & np.uint64(parts) == np.uint64(parts)
        rows = np.flatnonzero(can)
        once = np.unique(ids[rows], return_index=True)[1]  # a table may name a block twice
        joined = np.zeros(len(ids), dtype=np.bool_)
        joined[rows[once]] = True
        self._writers[ids[joined]] += 1
        self._free[ids[joined]] &= ~np.uint64(parts)
        return joined

    def settle(self, ids: Int32s, parts: int, good: Bools) -> Settled:
        """Take a rank's word on blocks of which it has claimed parts: it writes them no more."""
        self._writers[ids] -= 1
        filling = self._opening[ids] != 0
        self._missing[ids[filling & good]] &= ~np.uint64(parts)
        whole = filling & (self._missing[ids] == 0)
        void = ids[filling & ~good]
        self._give_up(void)
        self._end(ids[whole])
        self._end(void)
        over = ids[~whole & (self._opening[ids] == 0) & (self._writers[ids] == 0)]
        self.late += len(void) - len(over)
        return Settled(whole, void, over)

    def give_up(self, ids: Int32s) -> Settled:
        """End fills of blocks for a rank that may still write its parts: `settle` is to come."""
        void = ids[self._opening[ids] != 0]
        self._give_up(void)
        self._end(void)
        self.late += len(void)
        return Settled(np.zeros(len(ids), dtype=np.bool_), void, void[:0])

    def due(self, now: float) -> bool:
        """Whether a deadline has come."""
        return bool(self._openings) and next(iter(self._openings.values())).deadline <= now

    def expire(self, now: float) -> Settled:
        """Give up what is not whole at its deadline."""
        gone: list[Int32s] = []
        while self._openings:
            number, opening = next(iter(self._openings.items()))
            if opening.deadline > now:
                break
            ids = opening.ids[self._opening[opening.ids] == number]
            self._give_up(ids)
            self._end(ids)
            gone.append(ids)
            if number in self._openings:
                self._close(number)
        void = np.concatenate([np.zeros(0, dtype=np.int32), *gone])
        over = void[self._writers[void] == 0]
        self.late += len(void) - len(over)
        return Settled(np.zeros(len(void), dtype=np.bool_), void, over)

    def _give_up(self, ids: Int32s) -> None:
        numbers = self._opening[ids]
        for number in set(numbers.tolist()):
            _give_up(self._openings[number].group, self._name(ids[numbers == number]))

    def _end(self, ids: Int32s) -> None:
        """Blocks are filled no more."""
        numbers, counts = np.unique(self._opening[ids], return_counts=True)
        self._opening[ids] = 0
        self.filling -= len(ids)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            opening = self._openings[number]
            opening.left -= count
            if not opening.left and not opening.group.given_up:
                self._close(number)

    def _close(self, number: int) -> None:
        group = self._openings.pop(number).group
        group.openings.discard(number)
        if not group.openings:
            del self._groups[group.token]

    def _reach(self, count: int) -> None:
        size = max(count, len(self._opening) * 3 // 2) if count > len(self._opening) else 0
        self._opening = grown(self._opening, size, 0)
        self._writers = grown(self._writers, size, 0)
        self._missing = grown(self._missing, size, 0)
        self._free = grown(self._free, size, 0)


def _give_up(group: Group, keys: Sequence[bytes]) -> None:
    group.given_up.update(dict.fromkeys(keys))
    while len(group.given_up) > GIVEN_UP_MAX:
        del group.given_up[next(iter(group.given_up))]
