"""Bytes between the caller's arrays and arena slots, on worker threads, a table at a time.

A table is cut into tasks of a few layers of all its blocks, so that layers finish in order and a
reader may start on the first ones. A task is one call into a kernel that copies and digests without
the GIL. Nothing here knows of keys or tiers: `on_done` of a job tells its owner how each segment
fared.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kvengine.cache import PagedCache
from kvengine.codec import Codec, Range, Table
from kvengine.kernels.copy import BAD, GOOD
from kvengine.workers import Workers

TASK_BYTES = 8 << 20, 16 << 20  # at least, so that a call streams past the caches, and at most
JOBS_MAX = 1024
STAND_BACK_S = 1e-4

Bools = NDArray[np.bool_]


class Transfer:
    """Work under way between caches and the engine; says when it is done.

    A load's blocks are computed tokens only where `good` says so; `blocks` counts the leading good
    ones. A save's `good` says which blocks the engine holds now. The arrays are the engine's until
    `done`. All methods are safe from any thread.
    """

    def __init__(self, count: int, layers: int, lanes: int = 1) -> None:
        self.good: Bools = np.zeros(count, dtype=np.bool_)
        self.nbytes = 0
        self.error: str | None = None
        self._verdicts = np.zeros((lanes, count, layers), dtype=np.uint8)  # lanes: parts of a layer
        self._pending = [0] * layers
        self._changed = threading.Condition()
        self._finished = False
        self._cancelled = False
        self.then: Callable[[Bools], None] | None = None  # called once, when done

    @property
    def blocks(self) -> int:
        """Leading good blocks; final once `done`."""
        return len(self.good) if self.good.all() else int(self.good.argmin())

    def done(self) -> bool:
        """Whether all is over: the caller may reuse its blocks."""
        return self._finished

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until done. False if the time ran out first; the work goes on."""
        with self._changed:
            return self._changed.wait_for(lambda: self._finished, timeout_s)

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> bool:
        """Wait until one layer of every block is there. False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._finished or not self._pending[layer], timeout_s
            )

    def layer_good(self, layer: int) -> Bools:
        """Say which blocks' bytes of a layer a load has verified. Call after `wait_layer`."""
        good: Bools = (self._verdicts[:, :, layer] == GOOD).all(axis=0)
        return good

    def cancel(self, timeout_s: float | None = None) -> bool:
        """Begin no more copying, and wait for what is being copied. Blocks not whole are not good.

        True once the caller may reuse its blocks, False if the time ran out first. Reads from
        tiers end by themselves.
        """
        self.stop()
        return self.wait(timeout_s)

    # For the engine

    def stop(self) -> None:
        """Begin no more copying."""
        self._cancelled = True

    def expect(self, tasks: Sequence[tuple[Range, Range]]) -> None:
        """Count pieces of work, (blocks, layers) each, that their layers wait for."""
        with self._changed:
            for _, (first, end) in tasks:
                for layer in range(first, end):
                    self._pending[layer] += 1

    def arrived(
        self,
        rows: NDArray[np.intp],
        layers: Range,
        verdicts: NDArray[np.uint8] | None = None,
        lane: int = 0,
    ) -> None:
        """Count one piece less; verdicts: uint8[rows, those layers]."""
        first, end = layers
        ended = False
        with self._changed:
            if verdicts is not None:
                self._verdicts[lane, rows, first:end] = verdicts
            for layer in range(first, end):
                self._pending[layer] -= 1
                ended |= not self._pending[layer]
            if ended:
                self._changed.notify_all()

    def finish(self, good: Bools, nbytes: int, error: str | None = None) -> None:
        """Say how it went, and wake those who wait. Once."""
        with self._changed:
            self.good, self.nbytes = good, nbytes
            self.error = self.error or error
            self._finished = True
            self._changed.notify_all()
        if self.then is not None:
            self.then(good)

    def refuse(self) -> Transfer:
        """End before anything has begun; return itself."""
        self.finish(self.good, 0, "refused")
        return self

    def abandon(self) -> None:
        """After a fork, in the child: nothing arrives, and a lost thread may hold the lock."""
        self._changed = threading.Condition()
        if not self._finished:
            self.finish(np.zeros_like(self.good), 0, "the process has forked")

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled


@dataclass(frozen=True, slots=True)
class Job:
    """One table to move. `rows` are its blocks' places in the Transfer.

    digests: uint64[blocks, segments, 2], written by a save, read by a load. `keeps` is held
    until the job is over: the arrays behind the addresses. `segments`: only these (None: all).
    The first segment is `layer` of the Transfer, and the job's blocks are of one `lane`.
    """

    table: Table
    digests: NDArray[np.uint64]
    rows: NDArray[np.intp]
    on_done: Callable[[NDArray[np.uint8]], None]
    keeps: object
    segments: Range | None = None
    layer: int = 0
    lane: int = 0

    def layers(self, segments: Range) -> Range:
        """Return which layers of the Transfer some segments are."""
        return segments[0] + self.layer, segments[1] + self.layer


# What a save or a load begins with: the caller's cache, and its block table or slot mapping.
Moving = tuple[Transfer, PagedCache, NDArray[np.int64] | None, NDArray[np.int64] | None]


class Transfers:
    """Worker threads that run Jobs for Transfers. Bounded: at most JOBS_MAX at a time."""

    def __init__(self, threads: int, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._workers = Workers(threads, "kvengine-transfer", on_error)
        self._lock = threading.Lock()
        self._live: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._jobs = 0

    def begin(self, transfer: Transfer) -> bool:
        """Take on a transfer. False where too many are under way: it is to be refused."""
        self._live.add(transfer)
        return self._jobs < JOBS_MAX

    def save(self, transfer: Transfer, job: Job, codec: Codec) -> None:
        """Fill frames from caches; `on_done` gets verdicts, uint8[blocks, segments]."""
        verdicts = np.zeros(job.digests.shape[:2], dtype=np.uint8)

        def work(blocks: Range, segments: Range) -> None:
            codec.encode(job.table, blocks, segments, job.digests, verdicts)

        self._run(transfer, job, verdicts, work, loads=False)

    def load(self, transfer: Transfer, job: Job, codec: Codec) -> None:
        """Verify frames and fill caches; `on_done` gets verdicts, uint8[blocks, segments]."""
        verdicts = np.zeros(job.digests.shape[:2], dtype=np.uint8)

        def work(blocks: Range, segments: Range) -> None:
            codec.decode(job.table, blocks, segments, job.digests, verdicts)

        self._run(transfer, job, verdicts, work, loads=True)

    def close(self, timeout_s: float) -> bool:
        """Finish what is queued and end the threads. False if that took longer than the time."""
        return self._workers.close(timeout_s)

    def submit(self, work: Callable[[], None]) -> bool:
        """Queue other work of a transfer. False once closed."""
        return self._workers.submit(work)

    def stand_back(self) -> None:
        """Let those who waited for a finished transfer run first, unless more copying is due.

        What a worker does after it holds the interpreter's lock, and would hold them up.
        """
        if not self._jobs:
            time.sleep(STAND_BACK_S)

    def detach(self) -> None:
        """After a fork, in the child: no thread works here, so what was under way has failed."""
        for transfer in list(self._live):
            transfer.abandon()

    def guarded(self, transfer: Transfer, work: Callable[[], None]) -> bool:
        """Run the books' part of a transfer. False where it failed: that is counted and said.

        The owner finishes the transfer all the same, when nothing moves any more.
        """
        try:
            work()
        except Exception as error:  # a thread loop's border
            self._on_error(error)
            transfer.error = transfer.error or f"{type(error).__name__}: {error}"
            return False
        return True

    def _run(
        self,
        transfer: Transfer,
        job: Job,
        verdicts: NDArray[np.uint8],
        work: Callable[[Range, Range], None],
        *,
        loads: bool,
    ) -> None:
        tasks = _tasks(job.table, self._workers.count, job.segments)
        left = [len(tasks)]
        with self._lock:
            self._jobs += 1
        transfer.expect([(blocks, job.layers(segments)) for blocks, segments in tasks])

        def run(blocks: Range, segments: Range) -> None:
            try:
                if not transfer.cancelled:
                    work(blocks, segments)
            except Exception as error:  # one task of a thread loop: its blocks are not good
                verdicts[slice(*blocks), slice(*segments)] = BAD
                transfer.error = f"{type(error).__name__}: {error}"
                self._on_error(error)
            found = verdicts[slice(*blocks), slice(*segments)] if loads else None
            transfer.arrived(job.rows[slice(*blocks)], job.layers(segments), found, job.lane)
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
                self._jobs -= last
            if last:
                self.guarded(transfer, partial(job.on_done, verdicts))

        # Each thread takes the next task that is left: one wake-up a thread, not one a task.
        waiting = iter(tasks)

        def runs() -> None:
            for blocks, segments in waiting:
                run(blocks, segments)

        for _ in range(min(self._workers.count, len(tasks))):
            if not self._workers.submit(runs):
                transfer.stop()
                runs()


def _tasks(table: Table, threads: int, chosen: Range | None = None) -> list[tuple[Range, Range]]:
    """Cut a table into two pieces a thread or more: layers first, blocks where layers are large.

    Sizes are of the caller's bytes. `chosen`: these segments only.
    """
    blocks, segments = len(table.frames), len(table.segments)
    segment_bytes = max(1, table.block_nbytes // segments)
    first, end = chosen or (0, segments)
    low, high = TASK_BYTES
    size = min(max(low, blocks * (end - first) * segment_bytes // (2 * threads)), high)
    block_step = max(1, min(blocks, size // segment_bytes))
    segment_step = max(1, size // (segment_bytes * block_step))
    return [
        ((b, min(b + block_step, blocks)), (s, min(s + segment_step, end)))
        for s in range(first, end, segment_step)
        for b in range(0, blocks, block_step)
    ]
