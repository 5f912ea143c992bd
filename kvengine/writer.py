"""Write behind: a tier is given what is committed, while a bounded part is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from kvengine.compiled import Int32s
from kvengine.store import Store
from kvengine.tiers import DEADLINE_S, Span, Tier

WRITE_BYTES = 32 << 20


class Writer:
    """Move committed blocks to one tier. A slow one has a queue of its own: it delays no other."""

    def __init__(self, store: Store, tier: Tier, number: int) -> None:
        self._store = store
        self._tier = tier
        self._number = number
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._wanted = False
        self._under_way = 0
        self._stopped = False

    def pump(self) -> None:
        """Give the tier the next blocks, while less than WRITE_BYTES are under way.

        One thread at a time does so. A tier that reports at once calls back in here: it finds the
        turn taken, and leaves word to go on.
        """
        self._wanted = True
        while self._wanted and self._turn.acquire(blocking=False):
            try:
                self._wanted = False
                while not self._stopped and self._under_way < WRITE_BYTES and self._write():
                    pass
            finally:
                self._turn.release()

    def stop(self) -> None:
        """Write no more."""
        self._stopped = True

    def _write(self) -> bool:
        ids, spans = self._store.take_dirty(WRITE_BYTES // 2, self._number)
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
