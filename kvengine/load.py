"""One load under way: leased blocks from the arena, and through it from the tier, into a cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvengine.arena import Slots
from kvengine.blocks import Blocks, Reads
from kvengine.cache import PagedCache, cache_of
from kvengine.codec import Codec
from kvengine.compiled import Int32s
from kvengine.errors import LayoutError
from kvengine.fetches import Alarm
from kvengine.forms import Form
from kvengine.frame import PAGE_BYTES
from kvengine.index import NO_SLOT
from kvengine.kernels.copy import BAD, GOOD
from kvengine.keys import BlockKeys
from kvengine.lease import Bools, Lease
from kvengine.policy import NO_PARENT
from kvengine.store import EMPTY
from kvengine.tiers import Report, Span, Tier
from kvengine.transfer import Job, Moving, Transfer, Transfers

FETCH_BYTES = 16 << 20
PIECE_BYTES = 512 << 10  # of a frame that is read a few layers at a time


class Piece(NamedTuple):
    """A few layers of a frame, and where they stand in it. The first has the header as well."""

    layers: tuple[int, int]
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class Part:
    """Rows of a load's table that are moved together: those in memory, or a window of a tier.

    `tier` is where they are read from, -1 for nowhere, None for memory. Slots of a tier's window
    are lent by the store until the part is over; while `reading`, the tier may write to them. A
    window has `claimed` its blocks and `lent` bytes of the fetches' share; `joined`: it waits for
    blocks that others fetch. A `late` one is over for its load, which has its `early` rows, but
    keeps its slots until the tier has reported. One with `pieces` is read and scattered a few
    layers at a time; `running` of them are being scattered, and if it is late its load waits for
    those alone (`owed`).
    """

    rows: NDArray[np.intp]
    tier: int | None
    slots: Slots = field(default_factory=EMPTY.copy)
    claimed: Int32s = field(default_factory=EMPTY.copy)
    lent: int = 0
    arrived: Bools = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    early: Bools = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    alarm: Alarm | None = None
    expired: bool = False  # its deadline has come while it was not read
    joined: bool = False
    reading: bool = False
    late: bool = False
    over: bool = False
    pieces: tuple[Piece, ...] = ()
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    verdicts: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    running: int = 0
    owed: bool = False
    returned: bool = False


def loading(
    lease: Lease,
    caches: PagedCache | Sequence[object],
    block_table: object,
    slot_mapping: object,
    first: int,
) -> Moving:
    """Check what `Engine.load` is given, as `saving` does. Raises LayoutError."""
    view = lease.keys.namespace.view
    cache = cache_of(view.layout, caches, writable=True)
    if not 0 <= first <= lease.blocks:
        raise LayoutError(f"first is {first}, the lease has {lease.blocks} blocks")
    left = lease.blocks - first
    table, mapping, count = cache.checked(left, block_table, slot_mapping, unique=True)
    return Transfer(count, view.layout.layers, view.lanes), cache, table, mapping


class Load:
    """One load under way: what is in memory is scattered at once, the rest as it arrives."""

    def __init__(
        self,
        store: Blocks,
        transfers: Transfers,
        tiers: Sequence[Tier],
        fetches: Reads,
        deadline: float,
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
        self._fetches = fetches
        self._deadline = deadline
        self._forms = tuple(store.forms(keys.namespace))
        self._transfer = transfer
        self._keys = keys
        self._ids = ids
        self._numbers = numbers  # of each block's form
        self._cache = cache
        self._table = table
        self._mapping = None if mapping is None else mapping.reshape(len(ids), -1)
        self._view = keys.namespace.view
        self._layers = (0, self._view.layout.layers)
        self._good = np.zeros(len(ids), dtype=np.bool_)
        self._pinned = np.ones(len(ids), dtype=np.bool_)
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
            found = windows(self._store, self._ids, slots, self._numbers, self._window_bytes)
            parts += [Part(rows, tier) for rows, tier in found]
        return parts

    def _pieces(self, number: int) -> tuple[Piece, ...]:
        """How frames of a form are cut: in one, but for large frames of a lone disk."""
        form = next(form for form in self._forms if form.number == number)
        if len(self._tiers) != 1 or self._tiers[0].remote or len(form.templates) > 1:
            return ()
        if self._view.layout.layers != len(form.template.segments):
            return ()
        return pieces(form.template.header_bytes, form.template.segments[:, 1].tolist())

    def _window_bytes(self, number: int) -> int:
        """Layers are there early only if all blocks are read together, so far as memory is lent."""
        share = self._fetches.share_bytes
        return share if len(self._pieces(number)) > 1 else min(FETCH_BYTES, share)

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
            if part.reading or part.running:  # something has failed, and slots are still in use
                part.late, part.early = True, np.zeros_like(part.arrived)
        try:
            self._good[part.rows] = good
            if part.late:
                self._store.repin(self._ids[part.rows])
            elif len(part.rows):
                if part.tier is not None:
                    self._give_back(part, part.rows, part.slots, good)
                # A load of more than memory holds reads on into what it has done with.
                self._good[part.rows] &= self._store.still(self._ids[part.rows])
                self._pinned[part.rows] = False
                self._store.unpin(self._ids[part.rows])
        finally:
            try:
                if part.late:
                    self._unclaim(part)  # the tier may be broken, and never report
                else:
                    self._let_go(part)
            finally:
                self._part_done()

    def _give_back(self, part: Part, rows: NDArray[np.intp], slots: Slots, keep: Bools) -> None:
        assert part.tier is not None
        above = parents_of(self._ids, rows)
        self._store.fetched(self._ids[rows], slots, keep, above, part.tier)

    def _let_go(self, part: Part) -> None:
        """Let others fetch what a part has claimed, or find it in memory; give its share back."""
        lent, part.lent = part.lent, 0
        try:
            self._unclaim(part)
        finally:
            if lent:
                self._fetches.end(lent)

    def _unclaim(self, part: Part) -> None:
        if part.alarm is not None:
            part.alarm.cancel()
        claimed, part.claimed = part.claimed, EMPTY
        if len(claimed):
            self._fetches.free(claimed)

    def _part_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._store.unpin(self._ids[self._pinned])
            nbytes = int(self._good.sum()) * self._view.layout.payload_bytes
            self._transfer.finish(self._good, nbytes)

    def _none(self, part: Part) -> None:
        """End a part of which nothing came."""
        self._transfer.arrived(part.rows, self._layers)
        self._over(part, np.zeros(len(part.rows), dtype=np.bool_))

    def _fetch(self, part: Part) -> None:
        """Read blocks of a tier into slots, when it is their turn, then scatter them.

        Those that others are reading are waited for. Tier -1: dropped meanwhile.
        """
        rows = part.rows
        part.rows = rows[:0]  # until there are slots for them
        if part.tier == -1:
            self._none(part)
            return
        mine = self._fetches.claim(self._ids[rows])
        part.claimed = self._ids[rows[mine]]
        if not mine.all():
            self._join(rows[~mine])
        if not mine.any():
            self._none(part)
            return
        part.alarm = self._fetches.alarm(self._deadline, partial(self._too_late, part))
        nbytes = len(part.claimed) * self._store.frame_bytes(int(self._numbers[rows[0]]))

        def turn(in_time: bool) -> None:
            part.lent = nbytes if in_time else 0
            self._step(part, partial(self._turn if in_time else self._none_of, part, rows[mine]))

        self._fetches.begin(nbytes, self._deadline, turn)

    def _none_of(self, part: Part, rows: NDArray[np.intp]) -> None:
        self._none(part)

    def _turn(self, part: Part, rows: NDArray[np.intp]) -> None:
        slots, spans = self._store.take_slots(self._ids[rows])
        part.rows, part.slots = rows[: len(slots)], slots
        if not len(slots):
            self._none(part)
            return
        part.pieces = self._pieces(int(self._numbers[rows[0]]))
        if len(part.pieces) > 1:
            part.arrived = np.ones(len(slots), dtype=np.bool_)
            part.verdicts = np.zeros((len(slots), self._layers[1]), dtype=np.uint8)
            self._read_piece(part, 0, spans)
            return
        part.pieces = ()
        part.arrived = np.zeros(len(slots), dtype=np.bool_)
        self._read(part, np.arange(len(slots)), spans)

    def _read(self, part: Part, which: NDArray[np.intp], spans: Sequence[Span]) -> None:
        """Read some of a window's spans; what fails here is read from the next tier that has it."""
        assert part.tier is not None
        tier, waiting = part.tier, [len(which)]

        def report(index: int, good: bool) -> None:
            with self._lock:
                part.arrived[which[index]] = good
                waiting[0] -= 1
                last = waiting[0] == 0
                late = part.late
                if last:
                    part.reading = False
            if last and late:
                self._ended(part)
            elif last and not part.over:
                self._step(part, over)

        def over() -> None:
            failed = np.flatnonzero(~part.arrived)
            homes = self._store.homes(self._ids[part.rows[failed]], tier)
            if (homes >= 0).any() and not part.over:
                part.tier = int(homes[homes >= 0].min())
                self._read(part, failed[homes >= 0], spans)
                return
            work = partial(self._step, part, partial(self._arrived, part, part.arrived))
            if not self._transfers.submit(work):
                self._arrived(part, np.zeros(len(part.arrived), dtype=np.bool_))

        chosen = [spans[index] for index in which.tolist()]
        self._begin(part, tier, chosen, report)

    def _begin(self, part: Part, tier: int, spans: Sequence[Span], report: Report) -> None:
        with self._lock:
            part.reading = True
            expired = part.expired
        self._tiers[tier].read(spans, self._deadline, report)
        if expired:  # the alarm has rung between two reads, and rings only once
            self._too_late(part)

    def _too_late(self, part: Part) -> None:
        """The deadline has come: what is there is loaded, what is not stays the tier's to write."""
        with self._lock:
            if part.over or not (part.reading or part.joined):
                # It is being scattered, or its turn has not come, which is told elsewhere; or its
                # next read has not begun.
                part.expired = True
                return
            joined = part.joined
            if part.reading:
                part.over = part.late = True
                part.early = np.zeros_like(part.arrived) if part.pieces else part.arrived.copy()
                part.owed = part.running > 0
        if joined:
            self._none(part)
            return
        late = part.rows[~part.early]
        self._store.repin(self._ids[late])
        first = Part(part.rows[part.early], part.tier, part.slots[part.early])
        if len(first.rows):
            self._step(first, partial(self._arrived, first, np.ones(len(first.rows), dtype=bool)))
        elif not part.owed:
            if not part.pieces:
                self._transfer.arrived(part.rows, self._layers)
            self._part_done()

    def _ended(self, part: Part) -> None:
        """A late window's reads are over: its slots go to their entries, or back."""
        rest = np.flatnonzero(~part.early)
        ids = self._ids[part.rows[rest]]
        keep = np.zeros(len(rest), dtype=np.bool_) if part.pieces else part.arrived[rest]
        try:
            if len(rest):
                self._give_back(part, part.rows[rest], part.slots[rest], keep)
        finally:
            self._let_go(part)
            self._store.unpin(ids)

    def _read_piece(self, part: Part, at: int, spans: Sequence[Span]) -> None:
        """Read some layers of a window's frames; scatter them while the next are read."""
        which = np.flatnonzero(part.arrived)
        if not len(which):
            self._pieces_over(part)
            return
        _, start, stop = part.pieces[at]
        waiting = [len(which)]

        def report(index: int, good: bool) -> None:
            with self._lock:
                part.arrived[which[index]] &= good
                waiting[0] -= 1
                last = waiting[0] == 0
                late = part.late
                if last:
                    part.reading = False
                    part.running += not late  # until this piece is scattered
            if last and late:
                self._late_rest(part)
            elif last:
                if not self._transfers.submit(partial(self._step, part, over)):
                    self._step(part, over)

        def over() -> None:
            try:
                if at + 1 < len(part.pieces) and not part.over and part.arrived.any():
                    self._read_piece(part, at + 1, spans)
                self._scatter_piece(part, at)
            except BaseException:
                with self._lock:
                    part.running -= 1
                raise

        chosen = [replace(spans[index], start=start, stop=stop) for index in which.tolist()]
        self._begin(part, 0, chosen, report)

    def _scatter_piece(self, part: Part, at: int) -> None:
        layers = part.pieces[at].layers
        number = int(self._numbers[part.rows[0]])
        form = next(form for form in self._forms if form.number == number)
        size = form.template.header_bytes
        if at == 0:
            keys = [self._keys.key(row) for row in part.rows.tolist()]
            fine, found = form.read(self._store.arena.view, part.slots.tolist(), keys, self._view)
            part.digests = found[0]
            part.verdicts[part.arrived & ~fine] = BAD
        tried = np.flatnonzero(part.arrived & (part.verdicts != BAD).all(axis=1))
        rows = part.rows[tried]

        def done(verdicts: NDArray[np.uint8]) -> None:
            part.verdicts[tried, slice(*layers)] = verdicts[:, slice(*layers)]
            self._piece_done(part)

        if not len(tried):
            self._transfer.arrived(part.rows, layers)
            self._piece_done(part)
            return
        (place,) = self._view.places
        table = form.codec.table(
            self._cache.part(place, self._keys.namespace.layout),
            self._store.arena.addresses(part.slots[tried]) + size,
            None if self._table is None else self._table[rows],
            None if self._mapping is None else self._mapping[rows],
        )
        job = Job(table, part.digests[tried], rows, done, self._cache, layers)
        self._transfers.load(self._transfer, job, form.codec)
        self._transfer.arrived(part.rows, layers)

    def _piece_done(self, part: Part) -> None:
        with self._lock:
            part.running -= 1
            still = part.running or part.reading
            owed = part.owed and not part.running
            part.owed &= not owed
        if part.late:
            if not still:
                self._late_rest(part)
            if owed:
                self._part_done()
        elif not still:
            self._pieces_over(part)

    def _pieces_over(self, part: Part) -> None:
        bad = (part.verdicts == BAD).any(axis=1)
        try:
            self._store.corrupt(self._ids[part.rows[bad]], part.tier)
        finally:
            self._over(part, (part.verdicts == GOOD).all(axis=1))

    def _late_rest(self, part: Part) -> None:
        """Give back what a late window holds, once nobody reads or writes it."""
        with self._lock:
            if part.running or part.reading or part.returned:
                return
            part.returned = True
        self._ended(part)

    def _join(self, rows: NDArray[np.intp]) -> None:
        """Wait for blocks that others fetch, then scatter them from memory."""
        part = Part(rows, None, joined=True)
        with self._lock:
            self._left += 1
        self._transfer.expect([((0, len(rows)), self._layers)])
        part.alarm = self._fetches.alarm(self._deadline, partial(self._too_late, part))

        def ready() -> None:
            if not self._transfers.submit(partial(self._step, part, partial(self._joined, part))):
                self._none(part)

        self._fetches.join(self._ids[rows], ready)

    def _joined(self, part: Part) -> None:
        with self._lock:
            if part.over:
                return
            part.joined = False
        slots = self._store.slots(self._ids[part.rows])
        there = slots != NO_SLOT
        part.rows, part.slots = part.rows[there], slots[there]
        if not there.any():
            self._none(part)
            return
        self._scatter(part)
        self._transfer.arrived(part.rows, self._layers)

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
        jobs: list[tuple[Codec, Job]] = []

        def decoded(tried: NDArray[np.intp], verdicts: NDArray[np.uint8]) -> None:
            with self._lock:
                good[tried] &= (verdicts == GOOD).all(axis=1)
                bad[tried] |= (verdicts == BAD).any(axis=1)
                left[0] -= 1
                last = left[0] == 0
            if last:
                ended()

        def ended() -> None:
            try:
                self._store.corrupt(self._ids[part.rows[bad]], part.tier)
            finally:
                self._over(part, good)

        for form in self._forms:
            mine = np.flatnonzero(bad & (self._numbers[part.rows] == form.number))
            keys = [self._keys.key(row) for row in part.rows[mine].tolist()]
            slots = part.slots[mine].tolist()
            fine, digests = form.read(self._store.arena.view, slots, keys, self._view)
            tried = mine[fine]
            bad[tried], good[tried] = False, True  # until one of their parts is not
            if len(tried):
                chosen = [each[fine] for each in digests]
                jobs += self._jobs(form, part, tried, chosen, partial(decoded, tried))
        left = [len(jobs)]
        if not jobs:
            ended()
            return
        # No layer is there before all of its jobs are.
        self._transfer.expect([((0, len(part.rows)), self._layers)])
        for codec, job in jobs:
            self._transfers.load(self._transfer, job, codec)
        self._transfer.arrived(part.rows, self._layers)

    def _jobs(
        self,
        form: Form,
        part: Part,
        tried: NDArray[np.intp],
        digests: list[NDArray[np.uint64]],
        on_done: Callable[[NDArray[np.uint8]], None],
    ) -> list[tuple[Codec, Job]]:
        """Decode those of the window's rows whose headers are right and of one form, by parts."""
        rows = part.rows[tried]
        slots = self._store.arena.addresses(part.slots[tried])
        jobs = []
        for at, place in enumerate(self._view.places):
            shape, codec = self._keys.namespace.layout.part_layout, form.codec
            first, last = place.layers
            if last - first < shape.layers:
                shape, codec = replace(shape, layers=last - first), codec.cut(last - first)
            table = codec.table(
                self._cache.part(place, shape),
                slots + form.payload(place.number, first),
                None if self._table is None else self._table[rows],
                None if self._mapping is None else self._mapping[rows],
            )
            lane = at % self._view.lanes
            here = np.ascontiguousarray(digests[at][:, first:last])
            job = Job(table, here, rows, on_done, self._cache, layer=place.part.layer, lane=lane)
            jobs.append((codec, job))
        return jobs


def windows(
    store: Blocks,
    ids: Int32s,
    slots: Slots,
    numbers: Int32s,
    window_bytes: Callable[[int], int] = lambda number: FETCH_BYTES,
) -> Iterator[tuple[NDArray[np.intp], int]]:
    """Cut what is not in memory into windows of one tier (-1: none has it) and one form each."""
    homes = store.homes(ids)
    away = slots == NO_SLOT
    for tier in np.unique(homes[away]).tolist():
        rows = np.flatnonzero(away & (homes == tier))
        for number in dict.fromkeys(numbers[rows].tolist()):
            mine = rows[numbers[rows] == number]
            step = max(1, window_bytes(number) // store.frame_bytes(number))
            for at in range(0, len(mine), step):
                yield mine[at : at + step], tier


def parents_of(ids: Int32s, rows: NDArray[np.intp]) -> Int32s:
    """Return the block before each of some rows of a table; before the first one, none is known."""
    above: Int32s = np.where(rows > 0, ids[rows - 1], NO_PARENT).astype(np.int32)
    return above


def pieces(header_bytes: int, segment_bytes: Sequence[int]) -> tuple[Piece, ...]:
    """Cut a frame between layers, where those meet at a page, into PIECE_BYTES or more each."""
    made: list[Piece] = []
    first, start, at = 0, 0, header_bytes
    for layer, nbytes in enumerate(segment_bytes):
        at += nbytes
        last = layer + 1 == len(segment_bytes)
        if last or (at - start >= PIECE_BYTES and at % PAGE_BYTES == 0):
            made.append(Piece((first, layer + 1), start, at))
            first, start = layer + 1, at
    return tuple(made)
