"""The scheduler's half of the vLLM connector: what is held, what to load, what to save.

Called from vLLM's scheduling thread. It moves no bytes, and waits for nothing but a remote tier's
answer to a look-up (`find_s`). A prompt is looked up as one table; the lease that comes of it is
kept until its blocks are loaded or the request ends.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
    RequestOffloadingContext,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvengine.adapters.vllm_attachment import GROUP_BYTES, Attachment, Group, border
from kvengine.adapters.vllm_requests import Adapters, Unnamed, check_media

if TYPE_CHECKING:
    from kvengine.keys import BlockKeys
    from kvengine.lease import Lease

REUSE_S = 1.0  # how long an answer that is not the whole prompt is used again
STATS_S = 1.0
EVENTS_MAX = 1 << 16
MEASURED_TOKENS = 16  # fewer are a step's own cost
# Counts of the engine that vLLM's own metrics show as well.
GAUGES = ("memory_blocks", "memory_bytes", "tier_bytes")
COUNTERS = ("evicted_blocks", "save_refused_blocks", "corrupt_blocks", "tier_failures")


@dataclass(slots=True, eq=False)
class Asked:
    """What is remembered of one request, from its arrival to its end.

    `held` answers vLLM's look-ups since the last `ask`. A request that is not `named` computes
    something that no key tells apart; one of which a `load_failed` computes from then on, rather
    than ask again for ever.
    """

    name: str = ""
    request: Any = None
    adapter: str = ""
    named: bool = False
    load_failed: bool = False
    held: dict[bytes, bool] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)  # by group
    again_at: float = 0.0  # when the leases are too old to answer
    computed: int = 0  # tokens that vLLM itself had at the last `ask`
    in_memory: frozenset[bytes] = frozenset()  # of the blocks that are loaded for it


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a step computes: `tokens` of a prompt after `position` others."""

    adapter: str
    position: int
    tokens: int


@dataclass(slots=True)
class Run:
    """Consecutive blocks of one group. A load's lie in the lease from `first` on."""

    group: int
    keys: BlockKeys
    lease: Lease | None = None
    first: int = 0


@dataclass(slots=True)
class Blocks(LoadStoreSpec):
    """What the manager hands to the worker: runs to save, or to load, in the order of vLLM's."""

    asked: Asked = field(default_factory=Asked)
    runs: list[Run] = field(default_factory=list)

    def release(self) -> None:
        """Let leases go. A transfer that has begun keeps its own hold."""
        for run in self.runs:
            if run.lease is not None:
                run.lease.release()


@dataclass(frozen=True, slots=True)
class Layered:
    """A load of the step that is scheduled, and the blocks of the paged cache that it fills."""

    blocks: Blocks
    cache_blocks: NDArray[np.int32]


def _group_of(key: bytes) -> int:
    return int.from_bytes(key[-GROUP_BYTES:], "big")


class KVEngineManager(OffloadingManager):
    """The scheduler's half. `wants_events`: vLLM publishes what is stored where."""

    def __init__(
        self,
        attachment: Attachment,
        leave: Callable[[], None],
        adapters: Adapters,
        wants_events: bool = False,
    ) -> None:
        self.attachment = attachment
        self._leave = leave
        self._adapters = adapters
        self._wants_events = wants_events
        self._asked: dict[str, Asked] = {}
        self._saving: set[bytes] = set()
        self._loads: dict[str, Blocks] = {}
        self._events: list[OffloadingEvent] = []
        self._stats: dict[str, int] = {}
        self._stats_at = 0.0

    @property
    def requests(self) -> list[str]:
        """Name the requests that have come and not ended."""
        return list(self._asked)

    @property
    def leases(self) -> int:
        """Leases with blocks that are held for requests now."""
        waiting = [lease for asked in self._asked.values() for lease in asked.leases.values()]
        loading = [run.lease for blocks in self._loads.values() for run in blocks.runs]
        return sum(lease is not None and lease.blocks > 0 for lease in waiting + loading)

    # What the connector says before vLLM's scheduler asks

    @border(lambda self, request: None)
    def announce(self, request: Any) -> None:
        """Take in a new request: what it computes beside its tokens."""
        asked = self._asked[request.request_id] = Asked(request.request_id, request)
        try:
            check_media(request)
            asked.adapter = self._adapters.digest(request.lora_request)
            asked.named = self.attachment.takes(asked.adapter)
        except Unnamed:
            pass

    @border(lambda self, request_id, computed: None)
    def ask(self, request_id: str, computed: int) -> None:
        """Look up all blocks of a request after its `computed` tokens, a table a group."""
        asked = self._asked.get(request_id)
        if asked is None:
            return
        asked.held, asked.computed = {}, computed
        if not asked.named or asked.load_failed or not self.attachment.serves:
            self._release(asked)
            return
        for group in self.attachment.groups.values():
            hashes = group.hashes(asked.request)
            first = computed // group.block_tokens
            if first < len(hashes):
                self._ask(asked, group, hashes[first:], first)
        self.attachment.tried()

    def _ask(self, asked: Asked, group: Group, hashes: list[bytes], first: int) -> None:
        keys = self._keys(asked, group.number, first, hashes)
        if group.windowed:
            held = self.attachment.engine.contains(keys).tolist()
        else:
            lease = self._match(asked, group.number, keys)
            count = 0 if lease.worth.start else lease.worth.stop
            held = [index < count for index in range(len(hashes))]
            if lease.blocks and not count:  # all of it is sooner computed
                asked.leases.pop(group.number).release()
            if count < len(hashes) and hashes[count] in self._saving:
                asked.again_at = 0.0
        asked.held.update(zip(hashes, held, strict=True))

    def _match(self, asked: Asked, group: int, keys: BlockKeys) -> Lease:
        """Return a lease on the leading blocks: the one from before, while that is good."""
        engine, now = self.attachment.engine, time.monotonic()
        kept = asked.leases.get(group)
        if kept is not None and kept.keys.data == keys.data:
            whole = kept.blocks == len(keys) and now < kept.deadline - REUSE_S
            if whole or now < asked.again_at:
                return kept
            if not kept.blocks and not engine.probe(keys):
                asked.again_at = now + REUSE_S
                return kept
        found = asked.leases[group] = engine.match(keys)
        asked.again_at = now + REUSE_S
        if kept is not None:
            kept.release()
        return found

    @border(lambda self, request_id, tokens: False)
    def loads_in_step(self, request_id: str, tokens: int) -> bool:
        """Whether a step may compute with so many tokens that a look-up has found.

        It may where all of them come from memory: none waits for a tier.
        """
        asked = self._asked.get(request_id)
        leases = asked.leases.values() if asked is not None else ()
        return bool(leases) and all(
            lease.in_memory * lease.keys.namespace.layout.block_tokens >= tokens for lease in leases
        )

    @border(lambda self, request_id, tokens, cache_blocks: self._all_of(request_id, cache_blocks))
    def load_in_step(self, request_id: str, tokens: int, cache_blocks: list[int]) -> Layered:
        """Give the lease to a load of the step that is scheduled, where `loads_in_step` said so.

        vLLM has named these blocks as if they were computed, so that its own list of what to load
        is empty: it is made here, of the request's blocks in the paged cache.
        """
        asked = self._asked[request_id]
        ((number, group),) = self.attachment.groups.items()
        first, count = asked.computed // group.block_tokens, tokens // group.block_tokens
        lease = asked.leases.pop(number)
        start = first - lease.keys.position
        asked.in_memory = frozenset(group.hashes(asked.request)[first : first + count])
        blocks = Blocks(asked, [Run(number, lease.keys[start : start + count], lease, start)])
        return Layered(blocks, np.array(cache_blocks[first : first + count], dtype=np.int32))

    def _all_of(self, request_id: str, cache_blocks: list[int]) -> Layered:
        """Return a load of which nothing comes, after an error: all its blocks are unfilled."""
        asked = self._asked.get(request_id) or Asked(request_id)
        return Layered(Blocks(asked), np.array(cache_blocks, dtype=np.int32))

    @border(lambda self, request_id: None)
    def settle(self, request_id: str) -> None:
        """Let go of what a look-up has found: nothing of it is loaded."""
        asked = self._asked.get(request_id)
        if asked is not None:
            self._release(asked)

    @border(lambda self, scheduler_output: None)
    def measures(self, scheduler_output: Any) -> Prefill | None:
        """Say what prefill a step measures: one of a single request, and nothing else."""
        if len(scheduler_output.num_scheduled_tokens) != 1 or len(self.attachment.groups) != 1:
            return None
        ((name, tokens),) = scheduler_output.num_scheduled_tokens.items()
        asked, old = self._asked.get(name), scheduler_output.scheduled_cached_reqs
        if asked is None or not asked.named or asked.request.mm_features:
            return None
        new = scheduler_output.scheduled_new_reqs
        position = new[0].num_computed_tokens if new else old.num_computed_tokens[0]
        if tokens < MEASURED_TOKENS or position + tokens > asked.request.num_prompt_tokens:
            return None
        return Prefill(asked.adapter, position, tokens)

    # What vLLM's scheduler asks

    @border(lambda self, req_context: RequestOffloadingContext())
    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        asked = self._asked.get(req_context.req_id)
        if asked is not None:
            req_context.set_state(asked)  # vLLM keeps it until the request's last transfer is over
        return RequestOffloadingContext()

    @border(lambda self, key, req_context: LookupResult.MISS)
    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        asked = req_context.get_state(Asked)
        if asked is None or key not in asked.held:
            return LookupResult.MISS
        if asked.held[key]:
            return LookupResult.HIT
        return LookupResult.HIT_PENDING if key in self._saving else LookupResult.MISS

    @border(lambda self, keys, req_context: self._nothing(req_context))
    def prepare_load(self, keys: Collection[bytes], req_context: Any) -> Blocks:
        """Give the leases to a load. What is not held any more, the worker reports as unfilled."""
        load = Blocks(req_context.get_state(Asked) or Asked(req_context.req_id))
        self._loads[req_context.req_id] = load
        in_memory: list[bytes] = []
        for number, first, hashes in self._runs(list(keys), req_context):
            named = self._keys(load.asked, number, first, hashes)
            lease = load.asked.leases.pop(number, None)
            if lease is not None and first < lease.keys.position:
                lease.release()
                lease = None
            lease = lease or self.attachment.engine.match(named)
            run = Run(number, named, lease, first - lease.keys.position)
            load.runs.append(run)
            in_memory += hashes[: max(0, lease.in_memory - run.first)]
        load.asked.in_memory = frozenset(in_memory)
        return load

    def _nothing(self, req_context: Any) -> Blocks:
        """Return a load of which nothing comes, after an error."""
        return Blocks(req_context.get_state(Asked) or Asked(req_context.req_id))

    @border(lambda self, key, req_context: CacheHitSource.EXTERNAL_UNSPECIFIED)
    def get_load_source(self, key: bytes, req_context: Any) -> CacheHitSource:
        asked = req_context.get_state(Asked)
        if asked is None:
            return CacheHitSource.EXTERNAL_UNSPECIFIED
        return CacheHitSource.HOST if key in asked.in_memory else CacheHitSource.DISK

    @border(lambda self, keys, req_context: self._loads.pop(req_context.req_id, None))
    def complete_load(self, keys: Collection[bytes], req_context: Any) -> None:
        load = self._loads.pop(req_context.req_id, None)
        if load is not None:
            load.release()

    @border(lambda self, keys, req_context: PrepareStoreOutput([], Blocks(), []))
    def prepare_store(self, keys: Collection[bytes], req_context: Any) -> PrepareStoreOutput:
        """Take, of each run, from the first to the last lacking block; the engine skips others."""
        asked = req_context.get_state(Asked)
        output = PrepareStoreOutput([], Blocks(), [])
        if asked is None or not asked.named or asked.load_failed or not self.attachment.serves:
            return output
        output.store_spec = blocks = Blocks(asked)
        for number, first, hashes in self._runs(list(keys), req_context):
            named = self._keys(asked, number, first, hashes)
            held = self.attachment.engine.contains(named)
            lacking = [
                index
                for index, key in enumerate(hashes)
                if not held[index] and key not in self._saving
            ]
            if lacking:
                run = slice(lacking[0], lacking[-1] + 1)
                blocks.runs.append(Run(number, named[run]))
                output.keys_to_store.extend(hashes[run])
        self._saving.update(output.keys_to_store)
        return output

    @border(lambda self, keys, req_context, success=True: self._saving.clear())
    def complete_store(
        self, keys: Collection[bytes], req_context: Any, success: bool = True
    ) -> None:
        self._saving.difference_update(keys)
        if self._wants_events:
            self._stored(keys, req_context)

    def _stored(self, keys: Collection[bytes], req_context: Any) -> None:
        """Tell vLLM which blocks the engine holds now."""
        asked = req_context.get_state(Asked)
        if asked is None or len(self._events) >= EVENTS_MAX:
            return
        position = req_context.get_offload_key_position
        ordered = sorted(keys, key=lambda key: (_group_of(key), position(key) or 0))
        kept: list[Any] = []
        for number, first, hashes in self._runs(ordered, req_context):
            named = self._keys(asked, number, first, hashes)
            held = self.attachment.engine.contains(named).tolist()
            kept += [key for key, good in zip(hashes, held, strict=True) if good]
        if kept:
            self._events.append(OffloadingEvent(keys=kept, medium=Medium.CPU, removed=False))

    @border(lambda self: ())
    def take_events(self) -> Sequence[OffloadingEvent]:
        taken, self._events = self._events, []
        return taken

    @border(lambda self, req_context: self._asked.pop(req_context.req_id, None))
    def on_request_finished(self, req_context: Any) -> None:
        asked = self._asked.pop(req_context.req_id, None)
        if asked is not None:
            self._release(asked)

    @border(lambda self: self.attachment.forsake())
    def reset_cache(self) -> None:
        """Never find again what is held now: vLLM asks for this when the weights have changed."""
        self._saving.clear()
        self.attachment.rename(uuid.uuid4().hex)
        self._release_all()

    @border(lambda self: None)
    def get_stats(self) -> OffloadingConnectorStats | None:
        stats = OffloadingConnectorStats()
        for name, count in self.attachment.counts.items():
            if count:
                stats.increase_counter(name, count)
                self.attachment.counts[name] = 0
        if (now := time.monotonic()) >= self._stats_at:
            self._stats_at = now + STATS_S
            before, self._stats = self._stats, self.attachment.engine.stats()
            for name in COUNTERS:
                if grown := self._stats.get(name, 0) - before.get(name, 0):
                    stats.increase_counter(f"vllm:kvengine_{name}", grown)
            for name in GAUGES:
                stats.set_gauge(f"vllm:kvengine_{name}", self._stats.get(name, 0))
        return None if stats.is_empty() else stats

    @border(lambda self: None)
    def shutdown(self) -> None:
        self._release_all()
        self._leave()

    # Inside

    def _runs(
        self, keys: Sequence[bytes], req_context: Any
    ) -> Iterator[tuple[int, int, list[bytes]]]:
        """Cut vLLM's keys where the group changes, or a block of the prompt is left out.

        Yields the group, the index of the run's first block in the prompt, and the run.
        """
        run: list[bytes] = []
        start = (0, 0)
        for key in keys:
            number = _group_of(key)
            block_tokens = self.attachment.groups[number].block_tokens
            end_token = req_context.get_offload_key_position(key) or block_tokens
            at = (number, end_token // block_tokens - 1)
            if run and at != (start[0], start[1] + len(run)):
                yield *start, run
                run = []
            if not run:
                start = at
            run.append(key)
        if run:
            yield *start, run

    def _keys(self, asked: Asked, number: int, first: int, hashes: list[bytes]) -> BlockKeys:
        parent = self.attachment.groups[number].hash_before(asked.request, first)
        return self.attachment.keys(number, asked.adapter, hashes, first, parent)

    def _release(self, asked: Asked) -> None:
        for lease in asked.leases.values():
            lease.release()
        asked.leases.clear()

    def _release_all(self) -> None:
        for asked in self._asked.values():
            self._release(asked)
        for blocks in self._loads.values():
            blocks.release()
        self._loads.clear()
