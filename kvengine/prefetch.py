"""Read ahead: blocks that follow in a matched prefix come into memory before they are asked for.

Best effort, and behind whatever loads ask for: nobody waits for it, but a load of the same blocks
joins it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvengine.arena import Slots
from kvengine.compiled import Int32s
from kvengine.fetches import Fetches
from kvengine.load import parents_of, windows
from kvengine.store import Store
from kvengine.tiers import Tier

PREFETCH_BYTES = 64 << 20


def prefetch(
    store: Store,
    tiers: Sequence[Tier],
    fetches: Fetches,
    deadline: float,
    pinned: tuple[Int32s, Slots, Int32s],
    nbytes_max: int | None = PREFETCH_BYTES,
) -> int:
    """Begin to read pinned blocks (ids, slots, numbers), and unpin them when that is over.

    At most `nbytes_max` (None: all), from the start. Returns how many blocks are read.
    """
    ids, slots, numbers = pinned
    left, begun = math.inf if nbytes_max is None else nbytes_max, 0
    kept = np.zeros(len(ids), dtype=np.bool_)
    for rows, tier in windows(store, ids, slots, numbers):
        nbytes = len(rows) * store.frame_bytes(int(numbers[rows[0]]))
        mine = rows[fetches.claim(ids[rows])] if tier >= 0 and nbytes <= left else rows[:0]
        if not len(mine):
            continue
        left -= nbytes
        begun += len(mine)
        kept[mine] = True
        above = parents_of(ids, mine)
        window = Window(store, tiers[tier], tier, fetches, ids[mine], above, deadline)
        fetches.begin(nbytes, deadline, partial(window.turn, nbytes))
    store.unpin(ids[~kept])
    return begun


class Window:
    """Blocks of one tier that are read together."""

    def __init__(
        self,
        store: Store,
        tier: Tier,
        number: int,
        fetches: Fetches,
        ids: Int32s,
        parents: Int32s,
        deadline: float,
    ) -> None:
        self._store = store
        self._tier = tier
        self._number = number
        self._fetches = fetches
        self._ids = ids
        self._parents = parents
        self._deadline = deadline
        self._lock = threading.Lock()
        self._gone = False

    def turn(self, nbytes: int, in_time: bool) -> None:
        """Read, if it is not too late; then all goes back."""
        lent = nbytes if in_time else 0
        try:
            self._begin(lent, in_time)
        except BaseException:
            self._let_go(lent)  # slots stay lent: a broken tier may still write to them
            raise

    def _begin(self, lent: int, in_time: bool) -> None:
        slots, spans = self._store.take_slots(self._ids) if in_time else (self._ids[:0], [])
        arrived = np.zeros(len(slots), dtype=np.bool_)
        left = [len(slots)]

        def report(index: int, good: bool) -> None:
            with self._lock:
                arrived[index] = good
                left[0] -= 1
                last = left[0] == 0
            if last:
                self._over(slots, arrived, lent)

        if len(slots):
            self._tier.read(spans, self._deadline, report)
        else:
            self._over(slots, arrived, lent)

    def _over(self, slots: Slots, arrived: NDArray[np.bool_], lent: int) -> None:
        try:
            if len(slots):
                ids = self._ids[: len(slots)]
                parents = self._parents[: len(slots)]
                self._store.fetched(ids, slots, arrived, parents, self._number)
        finally:
            self._let_go(lent)

    def _let_go(self, lent: int) -> None:
        with self._lock:
            if self._gone:
                return
            self._gone = True
        self._fetches.free(self._ids)
        if lent:
            self._fetches.end(lent)
        self._store.unpin(self._ids)
