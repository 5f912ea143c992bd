"""Write behind: a cleaner gives a tier what is committed, ahead of the need for clean victims.

`low` and `high` are marks, in bytes of memory that wait for the tier. Up to the low one nothing is
written: what is dropped meanwhile never is. Between them one table is under way at a time, so that
reads have the device to themselves for most of it; above the high one as much as helps. A flush
writes all. With a low mark of 0, the default, blocks are written at once: all that is saved leaves
memory in the end, so waiting spares the bytes of what is dropped first, and costs what a crash
loses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvengine.compiled import Int32s
from kvengine.store import Store
from kvengine.tiers import DEADLINE_S, Span, Tier

WRITE_BYTES = 32 << 20
SHARE = 4  # of memory at most a quarter is under way to one tier: the rest is there for reserve


class Writer:
    """Move committed blocks to one tier. A slow one has a queue of its own: it delays no other."""

    def __init__(
        self, store: Store, tier: Tier, number: int, low_bytes: int = 0, high_bytes: int = 0
    ) -> None:
        self._store = store
        self._tier = tier
        self._number = number
        self._low_bytes = low_bytes
        self._high_bytes = high_bytes
        self._most = min(WRITE_BYTES, max(1, store.arena.nbytes // SHARE))
        self._flushing = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._wanted = False
        self._under_way = 0
        self._stopped = False

    def flush(self) -> None:
        """Begin to write all that waits, and what comes until that is written."""
        with self._lock:
            self._flushing = True
        self.pump()

    def pump(self) -> None:
        """Give the tier the next blocks, as many as the marks say.

        One thread at a time does so. A tier that reports at once calls back in here: it finds the
        turn taken, and leaves word to go on.
        """
        self._wanted = True
        while self._wanted and self._turn.acquire(blocking=False):
            try:
                self._wanted = False
                while not self._stopped and self._under_way < self._allowed() and self._write():
                    pass
            finally:
                self._turn.release()

    def stop(self) -> None:
        """Write no more."""
        self._stopped = True

    def _allowed(self) -> int:
        """Return how much may be under way before the next table is begun."""
        with self._lock:
            waiting = self._store.waiting_bytes(self._number)
            self._flushing &= waiting > 0
            flushing = self._flushing
        if flushing or waiting > self._high_bytes:
            return self._most
        return 1 if waiting > self._low_bytes else 0

    def _write(self) -> bool:
        ids, spans = self._store.take_dirty(max(1, self._most // 2), self._number)
        if not len(ids):
            return False
        with self._lock:
            self._under_way += sum(span.nbytes for span in spans)

        def report(
            index: int, good: bool, ids: Int32s = ids, spans: Sequence[Span] = spans
        ) -> None:
            self._store.written(ids[index : index + 1], good, self._number)
            with self._lock:
                self._under_way -= spans[index].nbytes
            self.pump()

        self._tier.write(spans, time.monotonic() + DEADLINE_S, report)
        return True
