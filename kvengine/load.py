"""One load under way: leased blocks from the arena, and through it from the tier, into a cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvengine.arena import Slots
from kvengine.cache import PagedCache
from kvengine.compiled import Int32s
from kvengine.index import NO_SLOT
from kvengine.kernels.copy import BAD, GOOD
from kvengine.keys import BlockKeys
from kvengine.lease import Bools
from kvengine.policy import NO_PARENT
from kvengine.store import Form, Store
from kvengine.tiers import DEADLINE_S, Span, Tier
from kvengine.transfer import Job, Transfer, Transfers

FETCH_BYTES = 16 << 20


class Load:
    """One load under way: what is in memory is scattered at once, the rest as it arrives."""

    def __init__(
        self,
        store: Store,
        transfers: Transfers,
        tiers: Sequence[Tier],
        transfer: Transfer,
        keys: BlockKeys,
        ids: Int32s,
        numbers: Int32s,
        cache: PagedCache,
        table: NDArray[np.int64] | None,
        mapping: NDArray[np.int64] | None,
    ) -> None:
        self._store = store
        self._transfers = transfers
        self._tiers = tiers
        self._forms = tuple(store.forms(keys.namespace))
        self._transfer = transfer
        self._keys = keys
        self._ids = ids
        self._numbers = numbers  # of each block's form
        self._cache = cache
        self._table = table
        self._mapping = None if mapping is None else mapping.reshape(len(ids), -1)
        self._layers = (0, keys.namespace.layout.layers)
        self._good = np.zeros(len(ids), dtype=np.bool_)
        self._lock = threading.Lock()
        self._left = 0

    def start(self, slots: Slots) -> None:
        """Cut the table into what is in memory and windows of what is not; begin them all."""
        here = np.flatnonzero(slots != NO_SLOT)
        windows: list[tuple[int, NDArray[np.intp]]] = []
        if len(here) < len(slots):
            homes = np.where(slots == NO_SLOT, self._store.homes(self._ids), len(self._tiers))
            for tier in range(-1, len(self._tiers)):
                windows += [(tier, rows) for rows in self._windows(np.flatnonzero(homes == tier))]
        self._left = 1 + len(windows)
        # A layer is there when every part's tasks are over; a window has none before it arrives.
        self._transfer.expect([((0, len(rows)), self._layers) for _, rows in windows])
        for tier, rows in windows:
            self._fetch(tier, rows)
        self._scatter(here, slots[here])

    def _windows(self, rows: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
        """Cut rows into windows of one form each."""
        numbers = self._numbers[rows]
        for number in dict.fromkeys(numbers.tolist()):
            mine = rows[numbers == number]
            step = max(1, FETCH_BYTES // self._store.frame_bytes(number))
            yield from (mine[at : at + step] for at in range(0, len(mine), step))

    def _fetch(self, tier: int, rows: NDArray[np.intp]) -> None:
        """Read blocks of a tier into slots, then scatter them. Tier -1: dropped meanwhile."""
        slots, spans = self._store.take_slots(self._ids[rows if tier >= 0 else rows[:0]])
        rows = rows[: len(slots)]
        if not len(rows):
            self._transfer.arrived(rows, self._layers)
            self._part_done()
            return
        arrived = np.zeros(len(rows), dtype=np.bool_)
        self._read(tier, np.arange(len(rows)), spans, arrived, rows, slots)

    def _read(
        self,
        tier: int,
        which: NDArray[np.intp],
        spans: Sequence[Span],
        arrived: Bools,
        rows: NDArray[np.intp],
        slots: Slots,
    ) -> None:
        """Read some of a window's spans; what fails here is read from the next tier that has it."""
        waiting = [len(which)]

        def report(index: int, good: bool) -> None:
            with self._lock:
                arrived[which[index]] = good
                waiting[0] -= 1
                last = waiting[0] == 0
            if last:
                over()

        def over() -> None:
            failed = np.flatnonzero(~arrived)
            homes = self._store.homes(self._ids[rows[failed]], tier)
            if (homes >= 0).any():
                after = int(homes[homes >= 0].min())
                self._read(after, failed[homes >= 0], spans, arrived, rows, slots)
            elif not self._transfers.submit(
                self._transfer, lambda: self._arrived(tier, rows, slots, arrived)
            ):
                self._arrived(tier, rows, slots, np.zeros(len(rows), dtype=np.bool_))

        chosen = [spans[index] for index in which.tolist()]
        self._tiers[tier].read(chosen, time.monotonic() + DEADLINE_S, report)

    def _arrived(self, tier: int, rows: NDArray[np.intp], slots: Slots, arrived: Bools) -> None:
        """Scatter a window whose reads are over; then its slots go to their entries."""

        def after(good: Bools) -> None:
            keep = np.zeros(len(rows), dtype=np.bool_)
            keep[arrived] = good
            parent = int(self._ids[rows[0] - 1]) if rows[0] else NO_PARENT
            self._store.fetched(self._ids[rows], slots, keep, parent, tier)

        self._scatter(rows[arrived], slots[arrived], after, tier)
        self._transfer.arrived(rows, self._layers)

    def _scatter(
        self,
        rows: NDArray[np.intp],
        slots: Slots,
        after: Callable[[Bools], None] | None = None,
        tier: int | None = None,
    ) -> None:
        """Verify headers, then segments, and fill the caller's cache."""
        good = np.zeros(len(rows), dtype=np.bool_)
        bad = np.ones(len(rows), dtype=np.bool_)
        jobs = []
        for form in self._forms:
            mine = np.flatnonzero(bad & (self._numbers[rows] == form.number))
            size = form.template.header_bytes
            fine, digests = form.template.read(
                (self._store.arena.view(slot, size) for slot in slots[mine].tolist()),
                [self._keys.key(row) for row in rows[mine].tolist()],
            )
            tried = mine[fine]
            bad[tried] = False
            if len(tried):
                jobs.append((form, tried, digests[fine]))
        left = [max(1, len(jobs))]

        def ended() -> None:
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
            if not last:
                return
            self._good[rows] = good
            self._store.corrupt(self._ids[rows[bad]], tier)
            if after is not None:
                after(good)
            self._part_done()

        if not jobs:
            ended()
        else:
            # No layer is there before all of its jobs are.
            self._transfer.expect([((0, len(rows)), self._layers)])
            for form, tried, digests in jobs:
                self._load(form, rows, tried, slots, digests, (good, bad), ended)
            self._transfer.arrived(rows, self._layers)

    def _load(
        self,
        form: Form,
        rows: NDArray[np.intp],
        tried: NDArray[np.intp],
        slots: Slots,
        digests: NDArray[np.uint64],
        found: tuple[Bools, Bools],
        ended: Callable[[], None],
    ) -> None:
        """Decode those of the rows whose headers are right and of one form."""
        chosen = rows[tried]
        table = form.codec.table(
            self._cache,
            self._store.arena.addresses(slots[tried]) + form.template.header_bytes,
            None if self._table is None else self._table[chosen],
            None if self._mapping is None else self._mapping[chosen],
        )

        def done(verdicts: NDArray[np.uint8]) -> None:
            found[0][tried] = (verdicts == GOOD).all(axis=1)
            found[1][tried] = (verdicts == BAD).any(axis=1)
            ended()

        self._transfers.load(
            self._transfer, Job(table, digests, chosen, done, self._cache), form.codec
        )

    def _part_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._store.unpin(self._ids)
            nbytes = int(self._good.sum()) * self._keys.namespace.layout.payload_bytes
            self._transfer.finish(self._good, nbytes)
