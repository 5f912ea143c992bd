"""One save under way: reserve → encode into slots → commit, for each form that its blocks take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvengine.cache import PagedCache
from kvengine.compiled import Int32s
from kvengine.kernels.copy import GOOD, OVERFULL
from kvengine.keys import BlockKeys
from kvengine.lease import Reservation
from kvengine.metrics import Metrics
from kvengine.policy.retention import NEVER, Retained
from kvengine.retention import Retention
from kvengine.store import Form, Store
from kvengine.tiers.finder import Finder
from kvengine.transfer import Job, Transfer, Transfers


class Save:
    """One save under way. The first block of a prompt may take a form of its own.

    `on_saved` is called after each commit, on a transfer's thread.
    """

    def __init__(
        self,
        store: Store,
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
        self._good = np.zeros(len(keys), dtype=np.bool_)
        self._keep = keep
        self._before = np.zeros(len(keys), dtype=np.bool_)  # held when the save began
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
                self._transfers.guarded(self._transfer, partial(self._part, first, last, form))
        self._part_done()

    def _part(self, first: int, last: int, form: Form) -> None:
        """Begin to save blocks first..last of the table in one form."""
        whole = last - first == len(self._keys)
        keys = self._keys if whole else self._keys[first:last]
        reservation = self._store.reserve(keys, form)
        self._good[first:last] |= reservation.held
        self._before[first:last] |= reservation.held
        if not len(reservation):
            return
        try:
            job = self._job(reservation, first, form)
        except BaseException:
            self._store.abort(reservation)
            raise
        with self._lock:
            self._left += 1
        self._transfers.save(self._transfer, job, form.codec)

    def _job(self, reservation: Reservation, first: int, form: Form) -> Job:
        rows = reservation.indices + first
        table = form.codec.table(
            self._cache,
            self._store.arena.addresses(reservation.slots) + form.template.header_bytes,
            None if self._table is None else self._table[rows],
            None if self._mapping is None else self._mapping[rows],
        )
        layers = self._keys.namespace.layout.layers
        digests = np.zeros((len(rows), layers, 2), dtype=np.uint64)

        def done(verdicts: NDArray[np.uint8]) -> None:
            self._encoded(form, reservation, first, digests, verdicts)

        return Job(table, digests, rows, done, self._cache)

    def _encoded(
        self,
        form: Form,
        reservation: Reservation,
        first: int,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Commit what is whole; save what found no room in the spare form, which has room."""
        whole = (verdicts == GOOD).all(axis=1)
        rows = reservation.indices + first
        saved = 0
        try:
            saved = self._commit(form, reservation, digests, whole)
            if saved:
                self._good[rows] |= whole
            with self._lock:
                self._saved += saved
            if self._finder:
                self._finder.forget([reservation.keys.key(i) for i in reservation.indices.tolist()])
            if not whole.all():
                full = ((verdicts == GOOD) | (verdicts == OVERFULL)).all(axis=1) & ~whole
                self._save_overfull(rows[full], form)
        finally:
            self._part_done()
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
        if not len(rows):
            return
        self._metrics.add("overfull_blocks", len(rows))
        spare = self._forms.spare
        if spare is not None and spare is not form:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                self._part(int(run[0]), int(run[-1]) + 1, spare)

    def _write_headers(
        self, form: Form, reservation: Reservation, digests: NDArray[np.uint64]
    ) -> None:
        keys, view = reservation.keys, self._store.arena.view
        indices = reservation.indices.tolist()
        headers = form.template.write(
            [keys.key(index) for index in indices],
            [keys.key(index - 1) if index else keys.parent for index in indices],
            reservation.fill,
            [keys.position + index for index in indices],
            digests,
        )
        for slot, header in zip(reservation.slots.tolist(), headers, strict=True):
            view(slot, len(header))[:] = header

    def _part_done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            if not self._good.all():
                # A key named twice, or saved by another meanwhile.
                self._good |= self._store.contains(self._keys)
            for each in self._keep:
                self._retain(each)
            nbytes = self._saved * self._keys.namespace.layout.payload_bytes
            self._transfer.finish(self._good, nbytes)

    def _retain(self, asked: Retention) -> None:
        tokens = self._keys.namespace.layout.block_tokens
        part = asked.blocks(self._keys.position, len(self._keys), tokens)
        new = (~self._before[part]).astype(np.int32)
        length, life = asked.duration_s or NEVER, asked.ttl_s or NEVER

        def tell(policy: Retained, entries: Int32s, now: float) -> int:
            return policy.keep(entries, new, asked.priority, now + length, now + life, now)

        self._store.retain(self._keys[part], tell)
