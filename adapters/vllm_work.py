"""The worker's half of the vLLM connector: starts transfers, and says which are over.

Called from vLLM's thread that runs the model. It waits where vLLM does: for a layer that attention
reads next, and before blocks of the paged cache are overwritten. vLLM takes no failed job from a
worker: what a save did not keep is a later miss, and what a load did not fill is told by
`take_unfilled` or `take_failed`. A block counts as unfilled until its bytes are verified.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult

from kvengine.adapters.vllm_attachment import UNFILLED, Attachment, border
from kvengine.adapters.vllm_schedule import Blocks, Layered, Prefill, Run

if TYPE_CHECKING:
    from kvengine.lease import Lease
    from kvengine.transfer import Transfer

WAIT_S = 5.0
LINGER_S = 0.01  # what a request that comes meanwhile waits at most
# Steps of which nothing is saved after one that computed with blocks that were not filled. vLLM
# schedules at most so many ahead.
DISTRUST_STEPS = 3

Bools = NDArray[np.bool_]
NONE: Callable[..., None] = lambda self, *rest: None  # noqa: E731


@dataclass(slots=True, eq=False)
class Job:
    """Transfers, a run each, and the blocks of the paged cache that they read or fill."""

    blocks: Blocks
    cache_blocks: NDArray[np.int32]
    is_load: bool
    started: float = field(default_factory=time.monotonic)
    transfers: list[Transfer | None] = field(default_factory=list)  # None: it could not be started
    lost: bool = False  # nothing of it counts

    def tables(self) -> list[NDArray[np.int32]]:
        """Return the blocks of the paged cache that each run reads or fills."""
        ends = np.cumsum([len(run.keys) for run in self.blocks.runs])
        return np.split(self.cache_blocks, ends)[: len(self.blocks.runs)]


class KVEngineWorker(OffloadingWorker):
    """The worker's half."""

    def __init__(self, attachment: Attachment, leave: Callable[[], None]) -> None:
        self.attachment = attachment
        self._leave = leave
        # A block's number does not say its group: of several, vLLM is told which requests failed.
        self._by_request = len(attachment.groups) > 1
        self._jobs: dict[int, Job] = {}
        self._layered: list[Job] = []
        self._results: list[TransferResult] = []
        self._unfilled: set[int] = set()
        self._failed: set[str] = set()
        self._distrusted = 0

    # Jobs of vLLM's

    @border(lambda self, job_id, source, target: self._refuse(job_id, target, source, False))
    def submit_store(self, job_id: int, source: Any, target: Blocks) -> bool:
        job = self._jobs[job_id] = Job(target, source.block_ids, False)
        if not self._distrusted and not target.asked.load_failed:
            self._start(job, self._save)
        return True

    @border(lambda self, job_id, source, target: self._refuse(job_id, source, target, True))
    def submit_load(self, job_id: int, source: Blocks, target: Any) -> bool:
        job = self._jobs[job_id] = Job(source, target.block_ids, True)
        self._start(job, self._load)
        return True

    def _refuse(self, job_id: int, blocks: Blocks, cache_blocks: Any, is_load: bool) -> bool:
        job = self._jobs.setdefault(job_id, Job(blocks, cache_blocks.block_ids, is_load))
        job.lost = True
        return True

    @border(NONE)
    def _start(self, job: Job, begin: Callable[[Run, NDArray[np.int32]], Transfer | None]) -> None:
        for run, table in zip(job.blocks.runs, job.tables(), strict=True):
            job.transfers.append(begin(run, table))
            if run.lease is not None:
                self._let_go(run.lease)

    @border(NONE)
    def _save(self, run: Run, table: NDArray[np.int32]) -> Transfer | None:
        assert len(table) == len(run.keys)
        cache = self.attachment.cache(run.group)
        return self.attachment.engine.save(run.keys, cache, block_table=table)

    @border(NONE)
    def _load(self, run: Run, table: NDArray[np.int32]) -> Transfer | None:
        lease = run.lease
        if lease is None or lease.blocks <= run.first:
            return None
        cache, table = self.attachment.cache(run.group), table[: lease.blocks - run.first]
        return self.attachment.engine.load(lease, cache, block_table=table, first=run.first)

    @border(NONE)
    def _let_go(self, lease: Lease) -> None:
        lease.release()  # a transfer that has begun has a hold of its own

    @border(lambda self: self._give_up())
    def get_finished(self) -> list[TransferResult]:
        for job_id in [number for number, job in self._jobs.items() if self._over(job)]:
            nbytes = self._end(self._jobs[job_id])
            seconds = time.monotonic() - self._jobs.pop(job_id).started
            self._results.append(TransferResult(job_id, True, nbytes, seconds))
        taken, self._results = self._results, []
        return taken

    @border(NONE)
    def linger(self) -> None:
        """Wait a moment for a load, in a step that computes nothing.

        vLLM asks again at once, for as long as it has nothing else to do, and would keep a core
        and the interpreter from the threads that load.
        """
        for job in self._jobs.values():
            for transfer in job.transfers if job.is_load else ():
                if transfer is not None and not transfer.wait(LINGER_S):
                    return

    def _over(self, job: Job) -> bool:
        return all(each is None or self._done(each) for each in job.transfers)

    @border(lambda self, transfer: self._stop(transfer))
    def _done(self, transfer: Transfer) -> bool:
        return transfer.done()

    def _end(self, job: Job) -> int:
        """Take down what a job has not filled. Returns the bytes that it moved."""
        good, nbytes = self._outcome(job)
        if job.is_load and not good.all():
            self._lose(job, ~good)
        return nbytes

    @border(lambda self, job: (np.zeros(len(job.cache_blocks), dtype=np.bool_), 0))
    def _outcome(self, job: Job) -> tuple[Bools, int]:
        """Say which of a job's blocks are good, and how many bytes were moved."""
        good, nbytes, first = np.zeros(len(job.cache_blocks), dtype=np.bool_), 0, 0
        if job.lost:
            return good, 0
        for table, transfer in zip(job.tables(), job.transfers, strict=False):
            if transfer is not None:
                good[first : first + len(transfer.good)] = transfer.good
                nbytes += transfer.nbytes
            first += len(table)
        if good.all():
            self.attachment.succeeded()
        return good, nbytes

    def _lose(self, job: Job, unfilled: Bools | slice) -> None:
        lost = job.cache_blocks[unfilled].tolist()
        job.blocks.asked.load_failed = True
        if self._by_request:
            self._failed.add(job.blocks.asked.name)
        else:
            self._unfilled.update(lost)
        self.attachment.counts[UNFILLED] += len(lost)

    def _give_up(self) -> list[TransferResult]:
        """End all jobs, after an error that leaves none to be trusted."""
        taken, self._results = self._results, []
        for job_id, job in self._jobs.items():
            for transfer in job.transfers:
                if transfer is not None:
                    self._stop(transfer)
            if job.is_load:
                job.blocks.asked.load_failed = True
                self._failed.add(job.blocks.asked.name)
                self._unfilled.update(job.cache_blocks.tolist())
            taken.append(TransferResult(job_id, True, 0, 0.0))
        self._jobs.clear()
        return taken

    @border(lambda self, transfer: True)
    def _stop(self, transfer: Transfer) -> bool:
        """Begin no more of a transfer, and return when it no longer touches the paged cache."""
        return transfer.cancel()

    @border(lambda self, job_ids: self._stop_all(job_ids))
    def wait(self, job_ids: Iterable[int]) -> None:
        """Return when these jobs no longer touch the paged cache: vLLM overwrites it next.

        What is not done within WAIT_S is cut short: its remaining blocks are not kept, or filled.
        """
        deadline = time.monotonic() + WAIT_S
        jobs = [self._jobs[job_id] for job_id in job_ids if job_id in self._jobs]
        for transfer in [each for job in jobs for each in job.transfers if each is not None]:
            if not transfer.wait(max(0.0, deadline - time.monotonic())):
                self._stop(transfer)

    def _stop_all(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            for transfer in self._jobs[job_id].transfers if job_id in self._jobs else ():
                if transfer is not None:
                    self._stop(transfer)

    # Loads that the step under way computes with

    @border(lambda self, loads: self._lose_layers(loads))
    def begin_layers(self, loads: Sequence[Layered]) -> None:
        """Begin loads that attention waits for, layer by layer."""
        for load in loads:
            job = Job(load.blocks, load.cache_blocks, True)
            self._layered.append(job)
            self._start(job, self._load)

    @border(lambda self, layer: self._lose_layers())
    def wait_layer(self, layer: str) -> None:
        """Return when attention may read a layer: its blocks are there, or will be reported."""
        for job in self._layered:
            for run, transfer in zip(job.blocks.runs, job.transfers, strict=False):
                index = self.attachment.groups[run.group].layers.get(layer)
                if transfer is not None and index is not None:
                    transfer.wait_layer(index)

    @border(lambda self: self._lose_layers())
    def end_layers(self) -> None:
        """Wait for loads of this step, and take down what they have not filled.

        vLLM throws a step's tokens away and computes again where it is told of unfilled blocks.
        Saves of what was computed with them are still to come, from this step and from those that
        are scheduled already: they are refused.
        """
        self._distrusted = max(0, self._distrusted - 1)
        for job in self._layered:
            for transfer in job.transfers:
                if transfer is not None:
                    transfer.wait()
            if not self._outcome(job)[0].all():
                self._distrusted = DISTRUST_STEPS
            self._end(job)
        self._layered.clear()

    def _lose_layers(self, loads: Sequence[Layered] = ()) -> None:
        """Trust no load of this step, after an error."""
        started = self._layered + [Job(load.blocks, load.cache_blocks, True) for load in loads]
        self._layered = []
        for job in started:
            for transfer in job.transfers:
                if transfer is not None:
                    self._stop(transfer)
            job.blocks.asked.load_failed = True
            self._unfilled.update(job.cache_blocks.tolist())
        if started:
            self._distrusted = DISTRUST_STEPS

    # What vLLM is told

    @border(lambda self: self._unfilled_after_error())
    def take_unfilled(self) -> set[int]:
        """Return, once, the cache blocks of finished loads that hold nothing good."""
        taken, self._unfilled = self._unfilled, set()
        return taken if not self._by_request else set()

    def _unfilled_after_error(self) -> set[int]:
        taken, self._unfilled = self._unfilled, set()
        return taken if not self._by_request else set()

    @border(lambda self: self._failed_after_error())
    def take_failed(self) -> set[str]:
        """Return, once, the requests whose load is not wholly good, where blocks do not tell."""
        taken, self._failed = self._failed, set()
        return taken if self._by_request else set()

    def _failed_after_error(self) -> set[str]:
        taken, self._failed = self._failed, set()
        return taken if self._by_request else set()

    @border(NONE)
    def observe(self, prefill: Prefill, seconds: float) -> None:
        """Tell the engine what computing took."""
        observe_prefill = self.attachment.engine.observe_prefill
        for number in self.attachment.groups:
            namespace = self.attachment.namespace(number, prefill.adapter)
            observe_prefill(namespace, prefill.position, prefill.tokens, seconds)

    @border(NONE)
    def shutdown(self) -> None:
        self.wait(list(self._jobs))
        self._jobs.clear()
        self._leave()
