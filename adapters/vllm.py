"""Keeps vLLM's prefixes: a connector over an engine embedded in the serving process.

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "KVEngineConnector",
        "kv_connector_module_path": "kvengine.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "file:///var/cache/kv?size=100G"}}'

On a CPU also set VLLM_ENABLE_V1_MULTIPROCESSING=0: the worker must share the scheduler's process.

vLLM names the blocks, decides which to keep, and guards blocks that are still read or written; this
file translates, and nothing else. A fault of ours is a counted miss, never an exception into vLLM.

`KVEngineConnector` is vLLM's OffloadingConnector with `KVEngineOffloadingSpec`, and what the
OffloadingConnector lacks: it tells the spec what determines a block's bytes (`vllm_identity`) and
what a request computes beside its tokens (`vllm_requests`); it looks a prompt up as one table; it
tells vLLM which blocks a load did not fill, so that they are computed (the OffloadingConnector
stops all of vLLM instead, which is why the spec does not start under it); it loads layer by layer
where that is asked for; and it tells the engine what computing takes. Tried with vLLM 0.32, whose
objects have no types here.
"""

from __future__ import annotations

import atexit
import copy
import os
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingSpec,
)
from vllm.v1.outputs import KVConnectorOutput

from kvengine.adapters.vllm_attachment import ERRORS, UNFILLED, Attachment
from kvengine.adapters.vllm_identity import Facts, describe, pages
from kvengine.adapters.vllm_requests import Adapters
from kvengine.adapters.vllm_schedule import COUNTERS, GAUGES, KVEngineManager, Layered, Prefill
from kvengine.adapters.vllm_work import KVEngineWorker
from kvengine.errors import ConfigError, KVEngineError

# Where the connector puts what it knows among the spec's extra settings.
FACTS, PAGES = "kvengine", "kvengine_pages"
LOADS = ("between_steps", "by_layer")


@dataclass
class StepMetadata(OffloadingConnectorMetadata):
    """vLLM's, and the loads that this step computes with, and what it is a measurement of.

    `idle`: it computes nothing.
    """

    layered: list[Layered] = field(default_factory=list)
    prefill: Prefill | None = None
    idle: bool = False


class KVEngineConnector(OffloadingConnector):
    """vLLM's OffloadingConnector with kvengine's spec.

    Extra settings: "load" says when vLLM waits for a load: "between_steps" (the request alone, the
    default), or "by_layer" (what memory holds is loaded while the step computes, layer by layer;
    what a tier holds, between steps). "observe_prefill" (true on a CPU): measure what computing
    takes, and load only what beats it. Raises ConfigError or ModelNotSupported, at start, for what
    cannot be served.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {transfer.kv_load_failure_policy!r}, expected "
                "'recompute': a block that is lost or damaged is then computed, and does not fail "
                "its request"
            )
        backend = vllm_config.parallel_config.distributed_executor_backend
        if backend in ("mp", "ray"):
            raise ConfigError(
                f"distributed_executor_backend is {backend!r}, which puts the worker in a process "
                "of its own; expected 'uni', since an embedded engine serves one process: leave "
                "the setting out, and on a CPU set VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )
        extra = transfer.kv_connector_extra_config
        if extra.get("load", LOADS[0]) not in LOADS:
            raise ConfigError(
                f"'load' in kv_connector_extra_config is {extra['load']!r}, expected one of "
                f"{', '.join(LOADS)}"
            )
        if extra.get("load") == "by_layer" and vllm_config.scheduler_config.async_scheduling:
            raise ConfigError(
                "'load' is 'by_layer' and async_scheduling is on, under which vLLM cannot take "
                "back a step that has computed with a block which failed to load: set "
                "async_scheduling=False (--no-async-scheduling), or 'load' to 'between_steps'"
            )
        facts = describe(vllm_config, kv_cache_config)
        found = _with_spec(vllm_config, facts)
        super().__init__(found, role, kv_cache_config)
        self._extra = found.kv_transfer_config.kv_connector_extra_config
        # vLLM takes back a request that has computed with unfilled blocks only if their number
        # says whose they are, which it does where there is one group.
        groups = len(kv_cache_config.kv_cache_groups)
        self._by_layer = extra.get("load") == "by_layer" and groups == 1
        self._layered: dict[int, Layered] = {}
        self._in_step = ""  # the request that was asked for last, where its load is the step's
        self._observes = extra.get("observe_prefill", _computes_in_step())
        self._began = 0.0

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers are waited for, which a graph of the whole model cannot do."""
        return extra_config.get("load") == "by_layer"

    @property
    def _manager(self) -> KVEngineManager:
        manager: KVEngineManager = self.scheduler.manager
        return manager

    @property
    def _worker(self) -> KVEngineWorker | None:
        half = self.connector_worker
        return half.worker if half is not None else None

    # The scheduler's side

    def on_new_request(self, request: Any) -> None:
        self._manager.announce(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._manager.ask(request.request_id, num_computed_tokens)
        found, between = super().get_num_new_matched_tokens(request, num_computed_tokens)
        # A step computes one token at least.
        self._in_step = ""
        if found and self._by_layer and num_computed_tokens + found < request.num_tokens:
            between = not self._manager.loads_in_step(request.request_id, found)
            self._in_step = "" if between else request.request_id
        return found, between

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if not num_external_tokens:
            self._manager.settle(request.request_id)
        elif self._in_step == request.request_id:
            (found,) = blocks.get_block_ids()
            # For vLLM's scheduler the load is over now: what the step computes is saved later.
            number = next(reversed(self.scheduler._current_batch_load_jobs))
            done = OffloadingWorkerMetadata({number: self.scheduler.config.num_workers})
            self.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=done))
            self._layered[number] = self._manager.load_in_step(
                request.request_id, num_external_tokens, found
            )

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if self._by_layer and connector_output.invalid_block_ids:
            # vLLM has named these blocks, and those computed on them, and goes on to compute them
            # anew; but a request that ends before that would leave them named, for others to find.
            named = set(connector_output.invalid_block_ids)
            for name in self._manager.requests:
                for blocks in self._kv_cache_manager.get_block_ids(name):
                    named.update(blocks)
            self._kv_cache_manager.evict_blocks(named)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        found = super().build_connector_meta(scheduler_output)
        layered, self._layered = self._layered, {}
        for number in layered:
            del found.load_jobs[number]
        prefill = None
        if self._observes and not layered and not found.load_jobs:
            prefill = self._manager.measures(scheduler_output)
        return StepMetadata(
            **vars(found),
            layered=list(layered.values()),
            prefill=prefill,
            idle=not scheduler_output.total_num_scheduled_tokens,
        )

    # The worker's side. Without loads for the step, vLLM calls start_load_kv after the model.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._extra[PAGES] = pages(self._vllm_config, kv_caches)
        super().register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._began = time.monotonic()

    def start_load_kv(self, forward_context: Any, **rest: Any) -> None:
        step, half = self._connector_metadata, self._worker
        if half is not None and isinstance(step, StepMetadata):
            if step.layered:
                half.begin_layers(step.layered)
            if step.prefill is not None:
                half.observe(step.prefill, time.monotonic() - self._began)
        super().start_load_kv(forward_context, **rest)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if (half := self._worker) is not None:
            half.wait_layer(layer_name)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        half = self._worker
        if half is not None:
            half.end_layers()
            if getattr(self._connector_metadata, "idle", False):
                half.linger()
        results = super().get_transfer_results(finished_req_ids)
        if half is not None:
            results.failed_recving.update(half.take_failed())
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the paged cache's blocks that a load did not fill; vLLM computes them."""
        return self._worker.take_unfilled() if self._worker is not None else set()

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *rest: Any) -> Any:
        """Return vLLM's offloading metrics, and the spec's."""
        return super().build_prom_metrics(_with_spec(vllm_config), *rest)


def _computes_in_step() -> bool:
    """Whether a step's computing is over when vLLM goes on, so that a clock can measure it."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _with_spec(vllm_config: Any, facts: Facts | None = None) -> Any:
    """Copy as much of a vLLM config as names our spec; the caller's stays as it is."""
    settings = copy.copy(vllm_config.kv_transfer_config)
    settings.kv_connector_extra_config = {
        **settings.kv_connector_extra_config,
        "spec_name": "KVEngineOffloadingSpec",
        "spec_module_path": __name__,
        FACTS: facts,
    }
    found = copy.copy(vllm_config)
    found.kv_transfer_config = settings
    return found


class KVEngineOffloadingSpec(OffloadingSpec):
    """Gives vLLM the scheduler's half (manager) and the worker's half of one attachment.

    Extra settings: "url" and "options" (a table), as `kvengine.open` takes them; "revision", a name
    of the weights where their files do not tell. Raises ConfigError for what one embedded engine
    cannot serve.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics beside vLLM's own."""
        counted = {
            ERRORS: "Errors of kvengine that became a miss",
            UNFILLED: "Blocks that a load did not fill",
            **{f"vllm:kvengine_{name}": f"kvengine's {name}" for name in COUNTERS},
        }
        return {name: OffloadingCounterMetadata(said) for name, said in counted.items()} | {
            f"vllm:kvengine_{name}": OffloadingGaugeMetadata(f"kvengine's {name}")
            for name in GAUGES
        }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not isinstance(self.extra_config.get(FACTS), Facts):
            raise ConfigError(
                "KVEngineOffloadingSpec was given to a connector that cannot report blocks which "
                "failed to load: set kv_connector to 'KVEngineConnector' and "
                f"kv_connector_module_path to {__name__!r}, without spec_name"
            )
        if not isinstance(self.extra_config.get("url"), str):
            raise ConfigError(
                "kv_connector_extra_config has no 'url': give one, such as 'mem://?size=4G' or "
                "'file:///var/cache/kv?size=100G'"
            )
        if config.parallel.world_size != 1:
            raise ConfigError(
                f"vLLM has {config.parallel.world_size} workers, expected 1: an embedded engine "
                "serves one process, tensor and pipeline parallel models are not supported yet"
            )
        if self.blocks_per_chunk != 1:
            raise ConfigError(
                f"an offloaded chunk is {self.blocks_per_chunk} blocks, expected 1: leave "
                "'block_size' and 'blocks_per_chunk' out of kv_connector_extra_config"
            )

    def get_manager(self) -> KVEngineManager:
        """Attach the scheduler's half. Raises what `kvengine.open` raises."""
        adapters = Adapters(self.extra_config[FACTS].lora)
        wants_events = self.config.enable_kv_cache_events
        return KVEngineManager(_attach(self.config), self._leave, adapters, wants_events)

    def get_worker(self, kv_caches: Any) -> KVEngineWorker:
        """Attach the worker's half with the paged cache.

        Raises what `kvengine.open` raises, ModelNotSupported and LayoutError for other pages.
        """
        attachment, extra = _attach(self.config), self.extra_config
        try:
            attachment.register(self.config, kv_caches, extra[FACTS], extra.get(PAGES, ""))
        except KVEngineError:
            self._leave()
            raise
        return KVEngineWorker(attachment, self._leave)

    def _leave(self) -> None:
        _detach(self.config)


# vLLM builds a connector for its scheduler and another for its worker: they share one engine.
_attachments: dict[tuple[str, str], Attachment] = {}


def _name(config: Any) -> tuple[str, str]:
    return config.extra_config["url"], config.engine_id


def _attach(config: Any) -> Attachment:
    name = _name(config)
    if name not in _attachments:
        _attachments[name] = Attachment(name[0], config.extra_config.get("options", {}))
    _attachments[name].users += 1
    return _attachments[name]


def _detach(config: Any) -> None:
    """Let go of one half; the last one closes the engine."""
    attachment = _attachments.get(_name(config))
    if attachment is not None:
        attachment.users -= 1
        if attachment.users == 0:
            _attachments.pop(_name(config)).close()


def _close_all() -> None:
    while _attachments:
        _attachments.popitem()[1].close()


os.register_at_fork(after_in_child=_attachments.clear)
atexit.register(_close_all)  # a script that uses vLLM's LLM class may end without a shutdown
