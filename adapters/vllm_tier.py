"""kvengine as a tier below vLLM's own CPU cache (TieringOffloadingSpec, vLLM 0.32, on a GPU).

    "kv_connector": "OffloadingConnector",
    "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": ...,
        "secondary_tiers": [{"type": "KVEngineTier", "module_path": "kvengine.adapters.vllm_tier",
                             "url": "mem://?size=1G | file:///var/cache/kv?size=100G",
                             "revision": "weights-2026-11"}]}

All of it runs in vLLM's scheduler process: the workers copy between GPU and vLLM's shared memory,
so that models on several ranks are served as well. vLLM tells a tier little of what determines the
bytes: `revision` must name the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

import kvengine
from kvengine.adapters.vllm_attachment import ERRORS, GROUP_BYTES, Attachment, Group, border
from kvengine.adapters.vllm_identity import Facts, hash_seed
from kvengine.errors import ConfigError

if TYPE_CHECKING:
    from kvengine.keys import BlockKeys
    from kvengine.transfer import Transfer

REMEMBER_S = 1.0
ANSWERS_MAX = 1 << 16

Place = tuple[int, int]  # a group, and the index of a chunk in its prompt


@dataclass(slots=True)
class Moved:
    """A job under way: its keys and transfers, run by run."""

    started: float = field(default_factory=time.monotonic)
    runs: list[tuple[list[bytes], Transfer | None]] = field(default_factory=list)

    def over(self) -> bool:
        return all(transfer is None or transfer.done() for _, transfer in self.runs)


class KVEngineTier(SecondaryTierManager):
    """Chunks of vLLM's CPU cache, kept in an engine. Called from vLLM's scheduling thread.

    Settings: "url" and "options" as `kvengine.open` takes them, and "revision": a name that changes
    with the weights, the LoRA adapters, and the kernels that order a page. Raises ConfigError where
    one is missing, and what `kvengine.open` raises.
    """

    medium = Medium.STORAGE

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return the counter beside vLLM's own."""
        return {ERRORS: OffloadingCounterMetadata("Errors of kvengine that became a miss")}

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        url: str = "",
        revision: str = "",
        options: dict[str, Any] | None = None,
        locality: str | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        for name, value in (("url", url), ("revision", revision)):
            if not isinstance(value, str) or not value:
                raise ConfigError(
                    f"the secondary tier KVEngineTier has no {name!r}: give an engine's URL, and "
                    "as 'revision' a name that changes with the weights, the LoRA adapters and the "
                    "attention kernels, of which vLLM tells a tier nothing"
                )
        self.locality = Locality(locality) if locality is not None else None
        self.attachment = Attachment(url, options or {})
        config = offloading_spec.config
        chunks = np.asarray(primary_kv_view).view(np.uint8).reshape(len(primary_kv_view), -1)
        step = config.cache.blocks_per_chunk
        groups = {
            group.group_id: Group(
                number=group.group_id,
                block_tokens=group.tokens_per_block * step,
                hash_step=group.tokens_per_block * step // config.cache.tokens_per_hash,
                windowed=False,
                layers={},
                layout=kvengine.Layout.opaque(
                    layers=1,
                    page_bytes=chunks.shape[1],
                    block_tokens=group.tokens_per_block * step,
                    permutation=_order(config, group),
                ),
                caches=[chunks],
            )
            for group in config.groups
        }
        facts = Facts(
            model=config.model.name,
            revision=f"named:{revision}",
            kv_dtype=config.model.dtype,
            positional="as the revision says",
            source=f"vllm/{hash_seed()}",
            permutation="",
        )
        self.attachment.take(groups, facts)
        config = self.attachment.engine.config
        self._asks_behind = config.valkey is not None or config.objects is not None
        self._jobs: dict[int, Moved] = {}
        self._results: list[JobResult] = []
        self._asked: dict[bytes, Place] = {}
        self._answers: dict[bytes, tuple[bool, float]] = {}

    # What is held. Of a remote store a whole step's keys are asked at once, and told in the next.

    @border(lambda self, key, req_context: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        if not self.attachment.serves:
            return LookupResult.MISS
        place = self._place(key, req_context)
        if not self._asks_behind:
            held = self.attachment.engine.contains(self._keys(place, [key]))[0]
            return LookupResult.HIT if held else LookupResult.MISS
        found = self._answers.get(key)
        if found is None or found[1] < time.monotonic():
            self._asked[key] = place
            return LookupResult.RETRY
        return LookupResult.HIT if found[0] else LookupResult.MISS

    @border(lambda self, context: self._asked.clear())
    def on_schedule_end(self, context: Any) -> None:
        asked, self._asked = self._asked, {}
        until = time.monotonic() + REMEMBER_S
        for place, run in _runs(asked.items()):
            held = self.attachment.engine.contains(self._keys(place, run)).tolist()
            self._answers.update({key: (good, until) for key, good in zip(run, held, strict=True)})
        while len(self._answers) > ANSWERS_MAX:
            del self._answers[next(iter(self._answers))]

    @border(lambda self: False)
    def has_pending_work(self) -> bool:
        return bool(self._asked or self._jobs)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    # Jobs

    @border(lambda self, job: self._lose(job))
    def submit_store(self, job: TransferJob) -> None:
        self._begin(job, self._save)

    @border(lambda self, job: self._lose(job))
    def submit_load(self, job: TransferJob) -> None:
        self._begin(job, self._load)

    def _lose(self, job: TransferJob) -> None:
        """Report a job that was not begun, or not wholly, as failed."""
        self._jobs.setdefault(job.job_id, Moved()).runs.append((list(job.keys), None))

    def _begin(self, job: TransferJob, move: Callable[..., Transfer | None]) -> None:
        moved = self._jobs[job.job_id] = Moved()
        chunks = {key: chunk for key, chunk in zip(job.keys, job.chunk_ids.tolist(), strict=True)}
        placed = ((key, self._place(key, job.req_context)) for key in job.keys)
        for place, run in _runs(placed):
            table = np.array([chunks[key] for key in run], dtype=np.int32)
            moved.runs.append((run, move(place[0], self._keys(place, run), table)))

    def _save(self, group: int, keys: BlockKeys, table: NDArray[np.int32]) -> Transfer | None:
        cache = self.attachment.cache(group)
        return self.attachment.engine.save(keys, cache, block_table=table)

    def _load(self, group: int, keys: BlockKeys, table: NDArray[np.int32]) -> Transfer | None:
        with self.attachment.engine.match(keys) as lease:
            if not lease.blocks:
                return None
            cache = self.attachment.cache(group)
            return self.attachment.engine.load(lease, cache, block_table=table[: lease.blocks])

    @border(lambda self: self._give_up())
    def get_finished_jobs(self) -> Iterable[JobResult]:
        for job_id in [number for number, moved in self._jobs.items() if moved.over()]:
            moved = self._jobs[job_id]
            good = [key for run, transfer in moved.runs for key in _good(run, transfer)]
            result = JobResult(
                job_id,
                success=len(good) == sum(len(run) for run, _ in moved.runs),
                successful_keys=good,
                transfer_time=time.monotonic() - moved.started,
                transfer_bytes=len(good) * self.block_size_bytes,
            )
            if result.success:
                self.attachment.succeeded()
            del self._jobs[job_id]
            self._results.append(result)
        taken, self._results = self._results, []
        return taken

    def _give_up(self) -> list[JobResult]:
        """End all jobs, after an error that leaves none to be trusted."""
        self._drain()
        lost = [JobResult(job_id, success=False) for job_id in self._jobs]
        self._jobs.clear()
        taken, self._results = self._results, []
        return taken + lost

    @border(lambda self: None)
    def _drain(self) -> None:
        for moved in self._jobs.values():
            for _, transfer in moved.runs:
                if transfer is not None:
                    transfer.wait()  # the engine ends it, at its own deadlines

    def drain_jobs(self) -> None:
        self._drain()

    @border(lambda self: None)
    def get_stats(self) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
            OffloadingConnectorStats,
        )

        count, self.attachment.counts[ERRORS] = self.attachment.counts[ERRORS], 0
        if not count:
            return None
        stats = OffloadingConnectorStats()
        stats.increase_counter(ERRORS, count)
        return stats

    @border(lambda self: None)
    def shutdown(self) -> None:
        self._drain()
        self.attachment.close()

    def _place(self, key: bytes, req_context: Any) -> Place:
        number = int.from_bytes(key[-GROUP_BYTES:], "big")
        tokens = self.attachment.groups[number].block_tokens
        end_token = req_context.get_offload_key_position(key) or tokens
        return number, end_token // tokens - 1

    def _keys(self, place: Place, hashes: list[bytes]) -> BlockKeys:
        return self.attachment.keys(place[0], "", hashes, place[1], None)


def _order(config: Any, group: Any) -> str:
    """Name how a chunk is made up: of which ranks' pages, in which order."""
    parallel = config.parallel
    ranks = f"tp {parallel.tp_size} pp {parallel.pp_size} pcp {parallel.pcp_size} "
    ranks += f"dcp {parallel.dcp_size} of {parallel.world_size}"
    if config.canonical_layout and parallel.is_parallelism_agnostic:
        ranks = "any"
    return f"vllm tier {config.kv_cache_layout} {ranks} {group}"


def _runs(placed: Iterable[tuple[bytes, Place]]) -> Iterator[tuple[Place, list[bytes]]]:
    """Cut keys where the group changes, or a chunk of the prompt is left out."""
    run: list[bytes] = []
    start = (0, 0)
    for key, place in placed:
        if run and place != (start[0], start[1] + len(run)):
            yield start, run
            run = []
        if not run:
            start = place
        run.append(key)
    if run:
        yield start, run


def _good(run: list[bytes], transfer: Transfer | None) -> list[bytes]:
    if transfer is None:
        return []
    return [key for key, good in zip(run, transfer.good.tolist(), strict=False) if good]
