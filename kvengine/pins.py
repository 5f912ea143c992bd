"""Blocks that callers have pinned: they stay in memory whatever the policy would do.

A soft pin ends by itself, is not renewed by reads, and takes at most a share of memory; a hard one
stays until it is taken away. Where all of memory is pinned, saves are refused and counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvengine.compiled import Int32s

SOFT_SHARE = 4  # a quarter of memory
FOREVER = float("inf")


@dataclass(slots=True)
class Pinned:
    """One pinned block: the store's name of it, its size, and when the pin ends."""

    entry: int
    nbytes: int
    until: float


class Pins:
    """Pins of one engine. Any thread may call any verb.

    `soft_bytes` is what soft pins may take; `let_go` is given entries whose pins have ended.
    """

    def __init__(
        self,
        soft_bytes: int,
        clock: Callable[[], float],
        let_go: Callable[[Int32s], None],
    ) -> None:
        self._soft_bytes = soft_bytes
        self._clock = clock
        self._let_go = let_go
        self._lock = threading.Lock()
        self._pinned: dict[bytes, Pinned] = {}
        self._taken = 0
        self._next = FOREVER  # no pin ends before

    def add(
        self, keys: Sequence[bytes], entries: Int32s, nbytes: int, duration_s: float | None
    ) -> int:
        """Pin blocks that the store holds for us; those not pinned are let go at once.

        duration_s: None for ever. A pin that is there already is not made shorter; a soft one may
        become a hard one. Returns how many of the leading blocks are pinned.
        """
        now = self._clock()
        self.expire(now)
        until = FOREVER if duration_s is None else now + duration_s
        spare, count = [], len(keys)
        with self._lock:
            for at, (key, entry) in enumerate(zip(keys, entries.tolist(), strict=True)):
                old = self._pinned.get(key)
                if old is not None and old.entry != entry:
                    spare.append(old.entry)  # it was dropped, and saved again
                    self._taken -= old.nbytes if old.until < FOREVER else 0
                    old = None
                if old is not None:
                    spare.append(entry)
                    if until == FOREVER and old.until < FOREVER:
                        self._taken -= old.nbytes
                    old.until = max(old.until, until)
                    continue
                if until < FOREVER and self._taken + nbytes > self._soft_bytes:
                    self._pinned.pop(key, None)
                    spare += entries[at:].tolist()
                    count = at
                    break
                self._pinned[key] = Pinned(entry, nbytes, until)
                self._taken += nbytes if until < FOREVER else 0
            self._next = min(self._next, until)
        self._give(spare)
        return count

    def remove(self, keys: Sequence[bytes]) -> int:
        """Take pins away. Returns how many there were."""
        with self._lock:
            found = [self._pinned.pop(key) for key in keys if key in self._pinned]
            self._taken -= sum(pin.nbytes for pin in found if pin.until < FOREVER)
        self._give([pin.entry for pin in found])
        return len(found)

    def expire(self, now: float | None = None) -> None:
        """Let go of those whose time is over. Looks at nothing before the first one ends."""
        now = self._clock() if now is None else now
        if now < self._next:
            return
        with self._lock:
            over = [key for key, pin in self._pinned.items() if pin.until <= now]
            found = [self._pinned.pop(key) for key in over]
            self._taken -= sum(pin.nbytes for pin in found)
            self._next = min((pin.until for pin in self._pinned.values()), default=FOREVER)
        self._give([pin.entry for pin in found])

    def detach(self) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pinned)

    def _give(self, entries: list[int]) -> None:
        if entries:
            self._let_go(np.array(entries, dtype=np.int32))
