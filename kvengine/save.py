"""One save under way: reserve → encode into slots → commit, for each form that its blocks take."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvengine.blocks import Blocks
from kvengine.cache import PagedCache, cache_of
from kvengine.errors import LayoutError
from kvengine.forms import Form
from kvengine.kernels.copy import GOOD, OVERFULL
from kvengine.keys import BlockKeys
from kvengine.lease import Reservation
from kvengine.metrics import Metrics
from kvengine.retention import Retention
from kvengine.tiers.finder import Finder
from kvengine.transfer import Job, Moving, Transfer, Transfers

FILL_MAX = 1024
EXPIRES_MAX = (1 << 32) - 1


def saving(
    keys: BlockKeys,
    caches: PagedCache | Sequence[object],
    block_table: object,
    slot_mapping: object,
) -> Moving:
    """Check what `Engine.save` is given. Raises LayoutError.

    Returns a new Transfer, the cache, and the table or the mapping.
    """
    layout = keys.namespace.view.layout
    cache = cache_of(layout, caches, writable=False)
    table, mapping, count = cache.checked(len(keys), block_table, slot_mapping, unique=False)
    if count != len(keys):
        raise LayoutError(f"a table for {count} blocks and {len(keys)} keys: give one for each")
    return Transfer(count, layout.layers), cache, table, mapping


def group_of(keys: BlockKeys, fill: bytes | None) -> bytes | None:
    """Return the group that fills these blocks together; None where their view is all of them.

    Raises LayoutError for what is no whole parts, and where a group is needed and `fill` does not
    name one.
    """
    view, layout = keys.namespace.view, keys.namespace.layout
    if not view.mask:
        raise LayoutError(
            f"{view.part} of a layout of {layout.layer_parts} x {layout.head_parts} parts: keys of "
            "such a range are for loading, whole parts are saved"
        )
    if view.mask == (1 << layout.part_count) - 1:
        return None
    if not isinstance(fill, bytes) or not 1 <= len(fill) <= FILL_MAX:
        raise LayoutError(
            f"fill is {fill!r}, expected 1 to {FILL_MAX} bytes that all ranks of this step "
            "share (the request's id, say): these keys are of a part of each block"
        )
    return fill


class Save:
    """One save under way. The first block of a prompt may take a form of its own.

    `on_saved` is called after each commit, on a transfer's thread. `group` names the ranks that
    fill these blocks together, each the parts of its view; None: this one has all of them.
    """

    def __init__(
        self,
        store: Blocks,
        transfers: Transfers,
        finder: Finder,
        metrics: Metrics,
        on_saved: Callable[[BlockKeys, int], None],
        transfer: Transfer,
        keys: BlockKeys,
        cache: PagedCache,
        table: NDArray[np.int64] | None,
        mapping: NDArray[np.int64] | None,
        keep: Sequence[Retention] = (),
        group: bytes | None = None,
    ) -> None:
        self._store = store
        self._transfers = transfers
        self._finder = finder
        self._metrics = metrics
        self._on_saved = on_saved
        self._transfer = transfer
        self._keys = keys
        self._cache = cache
        self._table = table
        self._mapping = None if mapping is None else mapping.reshape(len(keys), -1)
        self._view = keys.namespace.view
        self._group = group
        self._good = np.zeros(len(keys), dtype=np.bool_)
        self._keep = keep
        self._before = np.zeros(len(keys), dtype=np.bool_)  # held when the save began
        self._expires = self._lives()
        self._forms = store.forms(keys.namespace)
        self._saved = 0
        self._left = 1
        self._lock = threading.Lock()

    def start(self) -> None:
        """Reserve what is not held yet, and begin to encode it."""
        forms, count = self._forms, len(self._keys)
        head = 1 if self._keys.position == 0 and forms.first is not forms.usual else 0
        for first, last, form in ((0, head, forms.first), (head, count, forms.usual)):
            if first < last:
                self._transfers.guarded(self._transfer, partial(self._run, first, last, form))
        self._run_done()

    def _run(self, first: int, last: int, form: Form) -> None:
        """Begin to save blocks first..last of the table in one form."""
        whole = last - first == len(self._keys)
        keys = self._keys if whole else self._keys[first:last]
        reservation = self._store.reserve(keys, form, self._group)
        self._good[first:last] |= reservation.held
        self._before[first:last] |= reservation.held
        if len(reservation):
            try:
                jobs = self._jobs(reservation, first, form)
            except BaseException:
                self._store.abort(reservation)
                raise
            with self._lock:
                self._left += 1
            for job in jobs:
                self._transfers.save(self._transfer, job, form.codec)
        if self._group is not None and form is self._forms.usual and self._forms.spare is not None:
            left = ~reservation.held
            left[reservation.indices] = False
            # Those that another rank of the group fills in the spare form, or that had no room.
            self._runs(first + np.flatnonzero(left), self._forms.spare)

    def _runs(self, rows: NDArray[np.intp], form: Form) -> None:
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                self._run(int(run[0]), int(run[-1]) + 1, form)

    def _jobs(self, reservation: Reservation, first: int, form: Form) -> list[Job]:
        """Describe the work, a job for each part; the last one done commits."""
        rows = reservation.indices + first
        part = self._keys.namespace.layout.part_layout
        slots = self._store.arena.addresses(reservation.slots)
        parts = len(self._view.places)
        digests = np.zeros((parts, len(rows), part.layers, 2), dtype=np.uint64)
        verdicts = np.zeros((parts, len(rows), part.layers), dtype=np.uint8)
        left = [parts]

        def done(at: int, found: NDArray[np.uint8]) -> None:
            verdicts[at] = found
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
            if last:
                self._encoded(form, reservation, first, digests, verdicts)

        jobs = []
        for at, place in enumerate(self._view.places):
            table = form.codec.table(
                self._cache.part(place, part),
                slots + form.payload(place.number),
                None if self._table is None else self._table[rows],
                None if self._mapping is None else self._mapping[rows],
            )
            on_done = partial(done, at)
            jobs.append(Job(table, digests[at], rows, on_done, self._cache, layer=place.part.layer))
        return jobs

    def _encoded(
        self,
        form: Form,
        reservation: Reservation,
        first: int,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Commit what is whole; save what found no room in the spare form, which has room."""
        whole = (verdicts == GOOD).all(axis=(0, 2))
        rows = reservation.indices + first
        full = ((verdicts == GOOD) | (verdicts == OVERFULL)).all(axis=(0, 2)) & ~whole
        saved = 0
        try:
            if self._group is not None and full.any():
                self._widen(rows[full])
            saved = self._commit(form, reservation, digests, whole)
            if saved and self._group is None:
                self._good[rows] |= whole
            with self._lock:
                self._saved += saved
            if self._finder:
                self._finder.forget([reservation.keys.key(i) for i in reservation.indices.tolist()])
            if self._group is None and full.any():
                self._save_overfull(rows[full], form)
        finally:
            self._run_done()
        self._transfers.stand_back()
        self._metrics.add("saved_blocks", saved)
        self._on_saved(reservation.keys, len(rows))

    def _commit(
        self,
        form: Form,
        reservation: Reservation,
        digests: NDArray[np.uint64],
        whole: NDArray[np.bool_],
    ) -> int:
        try:
            self._write_headers(form, reservation, digests)
            return self._store.commit(reservation, whole)
        except BaseException:
            self._store.abort(reservation)
            raise

    def _save_overfull(self, rows: NDArray[np.intp], form: Form) -> None:
        """Save blocks again, in the form that has room for all."""
        self._metrics.add("overfull_blocks", len(rows))
        spare = self._forms.spare
        if spare is not None and spare is not form:
            self._runs(rows, spare)

    def _widen(self, rows: NDArray[np.intp]) -> None:
        """Give up blocks of which a part found no room: the others' arrays may have changed.

        The next fill of them is in the spare form.
        """
        self._metrics.add("overfull_blocks", len(rows))
        self._store.widen([self._keys.key(row) for row in rows.tolist()])

    def _write_headers(
        self, form: Form, reservation: Reservation, digests: NDArray[np.uint64]
    ) -> None:
        keys, view = reservation.keys, self._store.arena.view
        indices = reservation.indices.tolist()
        names = [keys.key(index) for index in indices]
        parents = [keys.key(index - 1) if index else keys.parent for index in indices]
        positions = [keys.position + index for index in indices]
        slots = reservation.slots.tolist()
        lives = [self._expires[position - self._keys.position] for position in positions]
        for at, place in enumerate(self._view.places):
            form.write(
                view,
                slots,
                place.number,
                names,
                parents,
                reservation.fill,
                positions,
                digests[at],
                lives,
            )

    def _lives(self) -> list[int]:
        """Return the second after which each block is used no more, also in tiers below."""
        ends = np.zeros(len(self._keys), dtype=np.int64)
        tokens = self._keys.namespace.layout.block_tokens
        for asked in self._keep:
            if asked.ttl_s is not None:
                part = asked.blocks(self._keys.position, len(self._keys), tokens)
                end = min(math.ceil(time.time() + asked.ttl_s), EXPIRES_MAX)
                ends[part] = np.maximum(ends[part], end)
        lives: list[int] = ends.tolist()
        return lives

    def _run_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            if not self._good.all():
                # A key named twice, or saved by another meanwhile.
                self._good |= self._store.contains(self._keys)
            for each in self._keep:
                self._retain(each)
            nbytes = self._saved * self._view.layout.payload_bytes
            self._transfer.finish(self._good, nbytes)

    def _retain(self, asked: Retention) -> None:
        tokens = self._keys.namespace.layout.block_tokens
        part = asked.blocks(self._keys.position, len(self._keys), tokens)
        self._store.keep(self._keys[part], ~self._before[part], asked)
