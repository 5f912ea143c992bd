"""The two halves of a connector that vLLM builds in one process, over the engine that they share.

The manager sits in the scheduler: what is held, what to load, what to save; it moves no bytes. The
worker starts transfers and says which are over. Both translate between vLLM's words and the
engine's; any error of ours is counted at their border and becomes a miss. Made by `adapters.vllm`.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingWorker,
    PrepareStoreOutput,
    RequestOffloadingContext,
    TransferResult,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

import kvengine
from kvengine.adapters.vllm_identity import Facts
from kvengine.errors import ModelNotSupported

# vLLM 0.32 looks through all loaded modules when it starts on a CPU, and fails on numba's: the
# engine is loaded when it is opened, after that.
if TYPE_CHECKING:
    from kvengine.cache import PagedCache
    from kvengine.keys import BlockKeys, Namespace
    from kvengine.lease import Lease
    from kvengine.transfer import Transfer

ERRORS = "vllm:kvengine_errors"
UNFILLED = "vllm:kvengine_unfilled_blocks"
ERRORS_MAX = 32  # after so many nothing more is asked of the engine, and vLLM serves on without it
WAIT_S = 5.0
FLUSH_S = 10.0

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Attachment:
    """One engine and one paged cache, shared by a manager and a worker."""

    def __init__(
        self, url: str, options: Mapping[str, Any], facts: Facts, block_tokens: int
    ) -> None:
        self.engine = kvengine.open(url, **options)
        self.block_tokens = block_tokens
        self.counts = {ERRORS: 0, UNFILLED: 0}  # since vLLM last asked
        self.users = 0
        self.caches: PagedCache | None = None
        self._errors = 0
        self._facts = facts
        self._layout: kvengine.Layout | None = None
        self._namespace: Namespace | None = None

    @property
    def serves(self) -> bool:
        """Whether new work may be asked of the engine."""
        return self._namespace is not None and self._errors < ERRORS_MAX

    def register(self, pages: Sequence[Any]) -> None:
        """Take the paged cache: one array a layer, [blocks, page_bytes] of one-byte elements.

        Raises ModelNotSupported where layers differ, LayoutError where an array does not fit.
        """
        sizes = sorted({page.shape[1] for page in pages})
        if len(sizes) != 1:
            raise ModelNotSupported(
                f"the layers have pages of {sizes} bytes, expected one size: not supported yet, "
                "serve this model without kvengine"
            )
        self._layout = kvengine.Layout.opaque(
            layers=len(pages),
            page_bytes=sizes[0],
            block_tokens=self.block_tokens,
            permutation=self._facts.permutation,
        )
        self.caches = self.engine.cache(self.rename(), pages)

    def rename(self, salt: str = "") -> Namespace:
        """Name all later blocks anew: with a fresh salt, what is held is never found again."""
        assert self._layout is not None
        facts, self._namespace = self._facts, None
        self._namespace = self.engine.namespace(
            model=facts.model,
            revision=facts.revision,
            layout=self._layout,
            kv_dtype=facts.kv_dtype,
            positional=facts.positional,
            source=facts.source,
            salt=salt,
        )
        return self._namespace

    def keys(self, hashes: list[bytes], position: int, parent: bytes | None) -> BlockKeys:
        """Name consecutive blocks; the first is the prompt's block `position`, after `parent`."""
        assert self._namespace is not None
        if parent is None:
            run = self._namespace.keys_of_hashes(hashes)
        else:
            run = self._namespace.keys_of_hashes([parent, *hashes])[1:]
        return replace(run, position=position)

    def failed(self, where: str) -> None:
        """Count an error that becomes a miss; the first is logged whole."""
        self._errors += 1
        self.counts[ERRORS] += 1
        self.engine.metrics.add("adapter_errors", adapter="vllm")
        if self._errors == 1:
            logger.exception("kvengine: an error in %s becomes a miss; more are counted", where)
        if self._errors == ERRORS_MAX:
            logger.error("kvengine: %d errors, vLLM serves on without it", self._errors)

    def close(self) -> None:
        """Write back what the tiers lack, for at most FLUSH_S, and close the engine."""
        self._namespace = None
        self.engine.flush(FLUSH_S)
        self.engine.close()


def _border(
    otherwise: Callable[[], R],
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[..., R]]:
    """Turn an error of a half's method into a count, and into what `otherwise` returns."""

    def wrap(method: Callable[Concatenate[Any, P], R]) -> Callable[..., R]:
        @functools.wraps(method)
        def guarded(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                self.attachment.failed(method.__qualname__)
                return otherwise()

        return guarded

    return wrap


@dataclass(slots=True)
class Asked:
    """What the manager remembers of one request; vLLM keeps it with the request."""

    hashes: dict[int, bytes] = field(default_factory=dict)  # by the block's index in the prompt
    load_failed: bool = False  # it computes from then on, rather than ask again for ever


@dataclass(slots=True)
class Blocks(LoadStoreSpec):
    """What the manager hands to the worker: keys to save, or a lease to load from."""

    asked: Asked = field(default_factory=Asked)
    keys: BlockKeys | None = None
    lease: Lease | None = None
    in_memory: frozenset[bytes] = frozenset()


def _asked(req_context: Any) -> Asked:
    found: Asked | None = req_context.get_state(Asked)
    if found is None:
        req_context.set_state(found := Asked())
    return found


class KVEngineManager(OffloadingManager):
    """The scheduler's half. Called from vLLM's scheduling thread; waits for nothing."""

    def __init__(self, attachment: Attachment, leave: Callable[[], None]) -> None:
        self.attachment = attachment
        self._leave = leave
        self._saving: set[bytes] = set()
        self._loads: dict[str, Blocks] = {}

    @_border(lambda: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        if not self.attachment.serves or _asked(req_context).load_failed:
            return LookupResult.MISS
        if self.attachment.engine.contains(self._keys([key], req_context))[0]:
            return LookupResult.HIT
        return LookupResult.HIT_PENDING if key in self._saving else LookupResult.MISS

    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> Blocks:
        """Lease the blocks. Where fewer are left than were found, the worker reports the rest."""
        load = self._loads[req_context.req_id] = Blocks(_asked(req_context))
        self._lease(load, list(keys), req_context)
        return load

    @_border(lambda: None)
    def _lease(self, load: Blocks, hashes: list[bytes], req_context: Any) -> None:
        load.keys = self._keys(hashes, req_context)
        load.lease = self.attachment.engine.match(load.keys)
        load.in_memory = frozenset(hashes[: load.lease.in_memory])

    def get_load_source(self, key: bytes, req_context: Any) -> CacheHitSource:
        load = self._loads.get(req_context.req_id)
        if load is None or load.lease is None:
            return CacheHitSource.EXTERNAL_UNSPECIFIED
        return CacheHitSource.HOST if key in load.in_memory else CacheHitSource.DISK

    @_border(lambda: None)
    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        load = self._loads.pop(req_context.req_id, None)
        if load is not None and load.lease is not None:
            load.lease.release()

    @_border(lambda: PrepareStoreOutput([], Blocks(), []))
    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput:
        """Take the run from the first to the last lacking block; the engine skips what it holds."""
        wanted = list(keys) if self.attachment.serves else []
        if not wanted:
            return PrepareStoreOutput([], Blocks(), [])
        named = self._keys(wanted, req_context)
        held = self.attachment.engine.contains(named)
        lacking = [i for i, key in enumerate(wanted) if not held[i] and key not in self._saving]
        run = slice(lacking[0], lacking[-1] + 1) if lacking else slice(0, 0)
        self._saving.update(wanted[run])
        return PrepareStoreOutput(wanted[run], Blocks(keys=named[run]), [])

    def complete_store(
        self, keys: Collection[bytes], req_context: Any, success: bool = True
    ) -> None:
        self._saving.difference_update(keys)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    @_border(lambda: None)
    def reset_cache(self) -> None:
        """Never find again what is held now: vLLM asks for this when the weights have changed."""
        self._saving.clear()
        self.attachment.rename(uuid.uuid4().hex)
        self._release()

    def get_stats(self) -> OffloadingConnectorStats | None:
        stats = OffloadingConnectorStats()
        for name, count in self.attachment.counts.items():
            if count:
                stats.increase_counter(name, count)
                self.attachment.counts[name] = 0
        return None if stats.is_empty() else stats

    @_border(lambda: None)
    def shutdown(self) -> None:
        self._release()
        self._leave()

    def _keys(self, hashes: list[bytes], req_context: Any) -> BlockKeys:
        """Name a run of one request's blocks, after the block before it if that was asked for."""
        asked, block_tokens = _asked(req_context), self.attachment.block_tokens
        end_token = req_context.get_offload_key_position(hashes[0]) or block_tokens
        first = end_token // block_tokens - 1
        asked.hashes.update(enumerate(hashes, first))
        return self.attachment.keys(hashes, first, asked.hashes.get(first - 1))

    def _release(self) -> None:
        for load in self._loads.values():
            if load.lease is not None:
                load.lease.release()
        self._loads.clear()


@dataclass(slots=True)
class Job:
    """A transfer, and the blocks of the paged cache that it reads or fills."""

    blocks: Blocks
    cache_blocks: NDArray[np.int32]
    is_load: bool
    started: float
    transfer: Transfer | None = None  # None: it could not be started


class KVEngineWorker(OffloadingWorker):
    """The worker's half. Called from vLLM's thread that runs the model; blocks in `wait` only.

    vLLM takes no failed job from a worker: what a save did not keep is a later miss, and what a
    load did not fill is told by `take_unfilled`.
    """

    def __init__(self, attachment: Attachment, leave: Callable[[], None]) -> None:
        self.attachment = attachment
        self._leave = leave
        self._jobs: dict[int, Job] = {}
        self._unfilled: set[int] = set()

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Blocks) -> bool:
        job = self._jobs[job_id] = Job(dst_spec, src_spec.block_ids, False, time.monotonic())
        self._save(job)
        return True

    def submit_load(self, job_id: int, src_spec: Blocks, dst_spec: Any) -> bool:
        job = self._jobs[job_id] = Job(src_spec, dst_spec.block_ids, True, time.monotonic())
        self._load(job)
        return True

    @_border(lambda: None)
    def _save(self, job: Job) -> None:
        engine, caches, keys = self.attachment.engine, self.attachment.caches, job.blocks.keys
        if keys is not None and caches is not None:
            job.transfer = engine.save(keys, caches, block_table=job.cache_blocks)

    @_border(lambda: None)
    def _load(self, job: Job) -> None:
        engine, caches, lease = self.attachment.engine, self.attachment.caches, job.blocks.lease
        if lease is not None and lease.blocks and caches is not None:
            table = job.cache_blocks[: lease.blocks]
            job.transfer = engine.load(lease, caches, block_table=table)

    def get_finished(self) -> list[TransferResult]:
        over = [job_id for job_id, job in self._jobs.items() if self._done(job)]
        return [self._finish(job_id, self._jobs.pop(job_id)) for job_id in over]

    @_border(lambda: True)
    def _done(self, job: Job) -> bool:
        return job.transfer is None or job.transfer.done()

    @_border(lambda: (np.zeros(0, dtype=np.bool_), 0))
    def _outcome(self, job: Job) -> tuple[NDArray[np.bool_], int]:
        if job.transfer is None:
            return np.zeros(0, dtype=np.bool_), 0
        return job.transfer.good, job.transfer.nbytes

    def _finish(self, job_id: int, job: Job) -> TransferResult:
        good, nbytes = self._outcome(job)
        if job.is_load:
            unfilled = np.ones(len(job.cache_blocks), dtype=np.bool_)
            unfilled[: len(good)] = ~good
            if unfilled.any():
                self._unfilled.update(job.cache_blocks[unfilled].tolist())
                job.blocks.asked.load_failed = True
                self.attachment.counts[UNFILLED] += int(unfilled.sum())
        return TransferResult(job_id, True, nbytes, time.monotonic() - job.started)

    def take_unfilled(self) -> set[int]:
        """Return, once, the cache blocks of finished loads that hold nothing good."""
        taken, self._unfilled = self._unfilled, set()
        return taken

    def wait(self, job_ids: Iterable[int]) -> None:
        """Return when these jobs no longer touch the paged cache: vLLM overwrites it next.

        A save that is not done within WAIT_S is cut short: its remaining blocks are not kept.
        """
        for job_id in job_ids:
            if job_id in self._jobs:
                self._wait(self._jobs[job_id])

    @_border(lambda: None)
    def _wait(self, job: Job) -> None:
        if job.transfer is not None and not job.transfer.wait(WAIT_S):
            job.transfer.cancel()

    @_border(lambda: None)
    def shutdown(self) -> None:
        self.wait(list(self._jobs))
        self._jobs.clear()
        self._leave()
