"""One load under way: leased blocks from the arena, and through it from the tier, into a cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

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
from kvengine.store import EMPTY, Form, Store
from kvengine.tiers import DEADLINE_S, Span, Tier
from kvengine.transfer import Job, Transfer, Transfers

FETCH_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Part:
    """Rows of a load's table that are moved together: those in memory, or a window of a tier.

    `tier` is where they are read from, -1 for nowhere, None for memory. Slots of a tier's window
    are lent by the store until the part is over; while `reading`, the tier may write to them.
    """

    rows: NDArray[np.intp]
    tier: int | None
    slots: Slots = field(default_factory=EMPTY.copy)
    reading: bool = False
    over: bool = False


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
        try:
            parts = self._parts(slots)
        except BaseException:
            self._store.unpin(self._ids)
            raise
        self._left = len(parts)
        here, *windows = parts
        # A layer is there when every part's tasks are over; a window has none before it arrives.
        self._transfer.expect([((0, len(part.rows)), self._layers) for part in windows])
        for part in windows:
            self._step(part, partial(self._fetch, part))
        self._step(here, partial(self._scatter, here))

    def _parts(self, slots: Slots) -> list[Part]:
        here = np.flatnonzero(slots != NO_SLOT)
        parts = [Part(here, None, slots[here])]
        if len(here) < len(slots):
            homes = np.where(slots == NO_SLOT, self._store.homes(self._ids), len(self._tiers))
            for tier in range(-1, len(self._tiers)):
                parts += [Part(rows, tier) for rows in self._windows(np.flatnonzero(homes == tier))]
        return parts

    def _windows(self, rows: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
        """Cut rows into windows of one form each."""
        numbers = self._numbers[rows]
        for number in dict.fromkeys(numbers.tolist()):
            mine = rows[numbers == number]
            step = max(1, FETCH_BYTES // self._store.frame_bytes(number))
            yield from (mine[at : at + step] for at in range(0, len(mine), step))

    def _step(self, part: Part, work: Callable[[], None]) -> None:
        """Do a part's next piece. Should it fail, the part is over, and none of it good.

        The others go on: the transfer is not done before the last of them.
        """
        if not self._transfers.guarded(self._transfer, work):
            self._over(part, np.zeros(len(part.rows), dtype=np.bool_))

    def _over(self, part: Part, good: Bools) -> None:
        """End a part, once: its good blocks are loaded, and lent slots go back to the store."""
        with self._lock:
            if part.over:
                return
            part.over = True
        try:
            self._good[part.rows] = good
            if part.tier is not None and len(part.rows) and not part.reading:
                before = part.rows[0] - 1
                parent = int(self._ids[before]) if before >= 0 else NO_PARENT
                self._store.fetched(self._ids[part.rows], part.slots, good, parent, part.tier)
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._store.unpin(self._ids)
                nbytes = int(self._good.sum()) * self._keys.namespace.layout.payload_bytes
                self._transfer.finish(self._good, nbytes)

    def _fetch(self, part: Part) -> None:
        """Read blocks of a tier into slots, then scatter them. Tier -1: dropped meanwhile."""
        rows = part.rows
        part.rows = rows[:0]  # until there are slots for them
        slots, spans = self._store.take_slots(self._ids[rows if part.tier != -1 else rows[:0]])
        part.rows, part.slots = rows[: len(slots)], slots
        if not len(slots):
            self._transfer.arrived(part.rows, self._layers)
            self._over(part, np.zeros(0, dtype=np.bool_))
            return
        arrived = np.zeros(len(slots), dtype=np.bool_)
        self._read(part, np.arange(len(slots)), spans, arrived)

    def _read(
        self, part: Part, which: NDArray[np.intp], spans: Sequence[Span], arrived: Bools
    ) -> None:
        """Read some of a window's spans; what fails here is read from the next tier that has it."""
        assert part.tier is not None
        tier, waiting = part.tier, [len(which)]

        def report(index: int, good: bool) -> None:
            with self._lock:
                arrived[which[index]] = good
                waiting[0] -= 1
                last = waiting[0] == 0
            if last and not part.over:
                part.reading = False
                self._step(part, over)

        def over() -> None:
            failed = np.flatnonzero(~arrived)
            homes = self._store.homes(self._ids[part.rows[failed]], tier)
            if (homes >= 0).any():
                part.tier = int(homes[homes >= 0].min())
                self._read(part, failed[homes >= 0], spans, arrived)
                return
            work = partial(self._step, part, partial(self._arrived, part, arrived))
            if not self._transfers.submit(work):
                self._arrived(part, np.zeros(len(arrived), dtype=np.bool_))

        chosen = [spans[index] for index in which.tolist()]
        part.reading = True
        self._tiers[tier].read(chosen, time.monotonic() + DEADLINE_S, report)

    def _arrived(self, part: Part, arrived: Bools) -> None:
        """Scatter a window whose reads are over; then its slots go to their entries."""
        self._scatter(part, arrived)
        self._transfer.arrived(part.rows, self._layers)

    def _scatter(self, part: Part, arrived: Bools | None = None) -> None:
        """Verify headers, then segments, and fill the caller's cache.

        `arrived` says which of the part's slots hold frames (None: all).
        """
        good = np.zeros(len(part.rows), dtype=np.bool_)
        bad = np.ones(len(part.rows), dtype=np.bool_) if arrived is None else arrived.copy()
        jobs: list[tuple[Form, Job]] = []

        def ended() -> None:
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                try:
                    self._store.corrupt(self._ids[part.rows[bad]], part.tier)
                finally:
                    self._over(part, good)

        for form in self._forms:
            mine = np.flatnonzero(bad & (self._numbers[part.rows] == form.number))
            size = form.template.header_bytes
            fine, digests = form.template.read(
                (self._store.arena.view(slot, size) for slot in part.slots[mine].tolist()),
                [self._keys.key(row) for row in part.rows[mine].tolist()],
            )
            tried = mine[fine]
            bad[tried] = False
            if len(tried):
                jobs.append((form, self._job(form, part, tried, digests[fine], (good, bad), ended)))
        left = [max(1, len(jobs))]
        if not jobs:
            ended()
            return
        # No layer is there before all of its jobs are.
        self._transfer.expect([((0, len(part.rows)), self._layers)])
        for form, job in jobs:
            self._transfers.load(self._transfer, job, form.codec)
        self._transfer.arrived(part.rows, self._layers)

    def _job(
        self,
        form: Form,
        part: Part,
        tried: NDArray[np.intp],
        digests: NDArray[np.uint64],
        found: tuple[Bools, Bools],
        ended: Callable[[], None],
    ) -> Job:
        """Decode those of the part's rows whose headers are right and of one form."""
        rows, good, bad = part.rows[tried], *found
        table = form.codec.table(
            self._cache,
            self._store.arena.addresses(part.slots[tried]) + form.template.header_bytes,
            None if self._table is None else self._table[rows],
            None if self._mapping is None else self._mapping[rows],
        )

        def done(verdicts: NDArray[np.uint8]) -> None:
            try:
                good[tried] = (verdicts == GOOD).all(axis=1)
                bad[tried] = (verdicts == BAD).any(axis=1)
            finally:
                ended()

        return Job(table, digests, rows, done, self._cache)
