"""Keeps vLLM's prefixes: an offloading spec over an engine embedded in the serving process.

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "KVEngineConnector",
        "kv_connector_module_path": "kvengine.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "file:///var/cache/kv?size=100G"}}'

On a CPU also set VLLM_ENABLE_V1_MULTIPROCESSING=0: the worker must share the scheduler's process.

vLLM names the blocks, decides which to keep, and guards blocks that are still read or written; this
file translates, and nothing else. A fault of ours is a counted miss, never an exception into vLLM.

`KVEngineConnector` is vLLM's OffloadingConnector and two things more, without which the spec does
not start: it tells the spec what determines a block's bytes (`vllm_identity`), and it tells vLLM
which blocks a load did not fill, so that they are computed. The OffloadingConnector cannot say so,
and stops all of vLLM instead. Tried with vLLM 0.32, whose objects have no types here.
"""

from __future__ import annotations

import atexit
import copy
import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingSpec

from kvengine.adapters.vllm_halves import (
    ERRORS,
    UNFILLED,
    Attachment,
    KVEngineManager,
    KVEngineWorker,
)
from kvengine.adapters.vllm_identity import Facts, describe
from kvengine.errors import ConfigError, KVEngineError

FACTS = "kvengine"  # where the connector puts the facts among the spec's extra settings


class KVEngineConnector(OffloadingConnector):
    """vLLM's OffloadingConnector with kvengine's spec.

    Raises ConfigError or ModelNotSupported, at start, for what cannot be served.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        policy = vllm_config.kv_transfer_config.kv_load_failure_policy
        if policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {policy!r}, expected 'recompute': a block that is lost "
                "or damaged is then computed, and does not fail its request"
            )
        backend = vllm_config.parallel_config.distributed_executor_backend
        if backend in ("mp", "ray"):
            raise ConfigError(
                f"distributed_executor_backend is {backend!r}, which puts the worker in a process "
                "of its own; expected 'uni', since an embedded engine serves one process: leave "
                "the setting out, and on a CPU set VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )
        facts = describe(vllm_config, kv_cache_config)
        super().__init__(_with_spec(vllm_config, facts), role, kv_cache_config)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the paged cache's blocks that a load did not fill; vLLM computes them."""
        half = self.connector_worker
        return half.worker.take_unfilled() if half and half.worker else set()

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *rest: Any) -> Any:
        """Return vLLM's offloading metrics, and the spec's."""
        return super().build_prom_metrics(_with_spec(vllm_config), *rest)


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
        """Return the counters beside vLLM's own."""
        return {
            ERRORS: OffloadingCounterMetadata("Errors of kvengine that became a miss"),
            UNFILLED: OffloadingCounterMetadata("Blocks that a load did not fill"),
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
        return KVEngineManager(_attach(self.config), self._leave)

    def get_worker(self, kv_caches: Any) -> KVEngineWorker:
        """Attach the worker's half with the paged cache.

        Raises what `kvengine.open` raises, ModelNotSupported and LayoutError for other pages.
        """
        attachment = _attach(self.config)
        try:
            attachment.register([item.tensor for item in kv_caches.tensors])
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
        extra, block_tokens = config.extra_config, config.groups[0].tokens_per_block
        options = extra.get("options", {})
        _attachments[name] = Attachment(extra["url"], options, extra[FACTS], block_tokens)
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
