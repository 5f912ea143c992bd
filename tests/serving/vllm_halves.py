"""Checks of the vLLM adapter that need vLLM's own classes, but no model. Run by tests/test_vllm.py.

    python tests/serving/vllm_halves.py

The last line of the output is `RESULT {name: "good", or the error}`.
"""

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvengine.adapters import checkpoint, vllm_attachment, vllm_identity
from kvengine.adapters import vllm as adapter
from kvengine.adapters.vllm_schedule import Prefill
from kvengine.errors import ConfigError, ModelNotSupported

LAYERS, BLOCKS, PAGE_BYTES, BLOCK_TOKENS = 3, 32, 4096, 16
HASHES = [
    bytes(make_offload_key(sha256(b"%d" % index).digest(), 0)) for index in range(BLOCKS // 2)
]
FACTS = vllm_identity.Facts("model", "revision", "auto", "rope", "vllm/sha256/seed", "order")


def config(**changed: Any) -> OffloadingConfig:
    extra = {"url": "mem://?size=16M", adapter.FACTS: FACTS, **changed.pop("extra", {})}
    settings: dict[str, Any] = {
        "groups": changed.pop("groups", (OffloadingGroupConfig(BLOCK_TOKENS, ("a", "b", "c"), 0),)),
        "worker_kv_bytes_per_block": LAYERS * PAGE_BYTES,
        "enable_kv_cache_events": changed.pop("enable_kv_cache_events", False),
        "extra_config": extra,
        "engine_id": "engine",
        "model": OffloadingModelConfig("model", "float32"),
        "cache": OffloadingCacheConfig(BLOCK_TOKENS, changed.pop("blocks_per_chunk", 1)),
        "parallel": OffloadingParallelConfig(
            0, changed.pop("world_size", 1), 1, 1, 1, 1, 0, 1, None, True
        ),
    }
    return OffloadingConfig(**settings, **changed)


def request(name: str, **changed: Any) -> Any:
    settings = {
        "block_hashes": [key[:-4] for key in HASHES],
        "mm_features": [],
        "lora_request": None,
    }
    return SimpleNamespace(request_id=name, **settings | changed)


def context(manager: Any, name: str, **changed: Any) -> ReqContext:
    """A new request, announced and looked up as the connector does it."""
    found = ReqContext(name)
    for index, key in enumerate(HASHES):
        found.set_offload_key_position(key, (index + 1) * BLOCK_TOKENS)
    manager.announce(request(name, **changed))
    manager.on_new_request(found)
    manager.ask(name, 0)
    return found


def pages() -> list[np.ndarray]:
    source = np.random.default_rng(5)
    return [source.integers(-128, 128, (BLOCKS, PAGE_BYTES), dtype=np.int8) for _ in range(LAYERS)]


def canonical(arrays: list[np.ndarray]) -> Any:
    """The paged cache as vLLM gives it to an offloading spec."""
    refs = [SimpleNamespace(tensor_idx=index) for index in range(len(arrays))]
    tensors = [SimpleNamespace(tensor=array) for array in arrays]
    return SimpleNamespace(tensors=tensors, group_data_refs=[refs])


@contextmanager
def both(arrays: list[np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """The two halves over one engine in memory, as vLLM makes them: a spec for each."""
    manager = adapter.KVEngineOffloadingSpec(config()).get_manager()
    worker = adapter.KVEngineOffloadingSpec(config()).get_worker(canonical(arrays))
    assert manager.attachment is worker.attachment
    try:
        yield manager, worker
    finally:
        worker.shutdown()
        manager.shutdown()
    assert not adapter._attachments


def cache_blocks(blocks: list[int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(blocks, [len(blocks)], [0])


def save(manager: Any, worker: Any, asked: ReqContext, count: int, job: int = 0) -> None:
    """Save the first `count` blocks, which lie in the cache at their own numbers."""
    output = manager.prepare_store(HASHES[:count], asked)
    wanted = [HASHES.index(key) for key in output.keys_to_store]
    assert worker.submit_store(job, cache_blocks(wanted), output.store_spec)
    worker.wait({job})
    assert [result.success for result in worker.get_finished()] == [True]
    manager.complete_store(set(output.keys_to_store), asked)


def load(manager: Any, worker: Any, asked: ReqContext, count: int, first: int) -> set[int]:
    """Load the first `count` blocks to the cache's blocks from `first`; return the unfilled."""
    blocks = manager.prepare_load(HASHES[:count], asked)
    assert worker.submit_load(99, blocks, cache_blocks(list(range(first, first + count))))
    worker.wait({99})
    assert [result.success for result in worker.get_finished()] == [True]
    manager.complete_load(set(HASHES[:count]), asked)
    assert manager.leases == 0
    return worker.take_unfilled()


def looked_up(manager: Any, asked: ReqContext) -> list[LookupResult]:
    manager.ask(asked.req_id, 0)
    return [manager.lookup(key, asked) for key in HASHES]


def found(hits: int) -> list[LookupResult]:
    return [LookupResult.HIT] * hits + [LookupResult.MISS] * (len(HASHES) - hits)


def what_is_saved_is_loaded() -> None:
    arrays = pages()
    with both(arrays) as (manager, worker):
        first = context(manager, "a")
        assert looked_up(manager, first) == found(0)
        save(manager, worker, first, 6)
        asked = context(manager, "b")
        assert looked_up(manager, asked) == found(6)
        assert manager.leases == 1
        blocks = manager.prepare_load(HASHES[:6], asked)
        assert manager.get_load_source(HASHES[5], asked) is CacheHitSource.HOST
        manager.complete_load(set(HASHES[:6]), asked)
        assert blocks.runs[0].lease.blocks == 6
        assert load(manager, worker, asked, 6, first=20) == set()
        for array in arrays:
            assert (array[20:26] == array[:6]).all()
        counted = manager.get_stats().reduce()
        assert counted["vllm:kvengine_memory_blocks"] == 6
        assert vllm_attachment.ERRORS not in counted


def a_prompt_is_looked_up_at_once() -> None:
    """One table for all its blocks, and none where the answer is not old."""
    with both(pages()) as (manager, worker):
        save(manager, worker, context(manager, "a"), 6)
        engine, tables = manager.attachment.engine, []
        match, probe = engine.match, engine.probe
        engine.match = lambda keys, **rest: tables.append(len(keys)) or match(keys, **rest)
        engine.probe = lambda keys: tables.append(len(keys)) or probe(keys)
        asked = context(manager, "b")
        assert looked_up(manager, asked) == found(6)
        assert looked_up(manager, asked) == found(6)
        assert tables == [len(HASHES)]
        manager.ask("b", 4 * BLOCK_TOKENS)
        assert manager.lookup(HASHES[3], asked) is LookupResult.MISS
        assert manager.lookup(HASHES[5], asked) is LookupResult.HIT
        assert tables == [len(HASHES), len(HASHES) - 4]
        assert manager.leases == 1
        manager.on_request_finished(asked)
        assert manager.leases == 0


def a_part_of_a_prompt_is_loaded() -> None:
    arrays = pages()
    with both(arrays) as (manager, worker):
        save(manager, worker, context(manager, "a"), 6)
        asked = context(manager, "b")
        blocks = manager.prepare_load(HASHES[2:5], asked)
        assert worker.submit_load(1, blocks, cache_blocks([20, 21, 22]))
        worker.wait({1})
        worker.get_finished()
        assert worker.take_unfilled() == set()
        for array in arrays:
            assert (array[20:23] == array[2:5]).all()


def what_is_held_is_not_saved_again() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context(manager, "a"), 4)
        second = context(manager, "b")
        output = manager.prepare_store(HASHES[:8], second)
        assert output.keys_to_store == HASHES[4:8]
        third = context(manager, "c")
        assert manager.prepare_store(HASHES[:8], third).keys_to_store == []
        assert looked_up(manager, third)[5] is LookupResult.HIT_PENDING
        manager.complete_store(set(HASHES[4:8]), second)
        assert looked_up(manager, third) == found(4)


def what_is_lost_is_reported_and_not_asked_again() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context(manager, "a"), 6)
        asked = context(manager, "b")
        engine, attachment = manager.attachment.engine, manager.attachment
        manager.settle("b")
        assert engine.drop(attachment.keys(0, "", [HASHES[2]], 2, HASHES[1])) == 1
        assert load(manager, worker, asked, 6, first=20) == {22, 23, 24, 25}
        assert worker.take_unfilled() == set()
        assert looked_up(manager, asked) == found(0)
        assert looked_up(manager, context(manager, "c")) == found(2)
        assert manager.get_stats().reduce()[vllm_attachment.UNFILLED] == 4


def what_was_computed_with_unfilled_blocks_is_not_saved() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context(manager, "a"), 6)
        context(manager, "b")
        engine = manager.attachment.engine
        assert manager.loads_in_step("b", 6 * BLOCK_TOKENS)
        layered = manager.load_in_step("b", 6 * BLOCK_TOKENS, list(range(20, 28)))
        load_of_engine, engine.load = engine.load, broken
        worker.begin_layers([layered])
        worker.wait_layer("a")
        others = context(manager, "c")
        output = manager.prepare_store(HASHES[:8], others)
        worker.end_layers()
        assert worker.take_unfilled() == set(range(20, 26))
        worker.submit_store(1, cache_blocks([30, 31]), output.store_spec)
        worker.wait({1})
        assert [result.job_id for result in worker.get_finished()] == [1]
        manager.complete_store(set(output.keys_to_store), others)
        assert looked_up(manager, context(manager, "d")) == found(6)
        engine.load = load_of_engine
        for _ in range(3):
            worker.end_layers()
        save(manager, worker, context(manager, "e"), 8, job=2)
        assert looked_up(manager, context(manager, "f")) == found(8)


def layers_arrive_in_a_step() -> None:
    arrays = pages()
    with both(arrays) as (manager, worker):
        save(manager, worker, context(manager, "a"), 6)
        context(manager, "b")
        assert not manager.loads_in_step("b", 7 * BLOCK_TOKENS)
        assert manager.loads_in_step("b", 6 * BLOCK_TOKENS)
        layered = manager.load_in_step("b", 6 * BLOCK_TOKENS, list(range(20, 28)))
        worker.begin_layers([layered])
        for name, array in zip("abc", arrays, strict=True):
            worker.wait_layer(name)
            assert (array[20:26] == array[:6]).all()
        worker.end_layers()
        assert worker.take_unfilled() == set()
        assert manager.leases == 0


def broken(*_: Any, **__: Any) -> Any:
    raise OSError("broken")


def an_error_is_a_counted_miss() -> None:
    with both(pages()) as (manager, worker):
        engine, asked = manager.attachment.engine, context(manager, "a")
        save(manager, worker, asked, 2)
        engine.load = broken
        assert load(manager, worker, context(manager, "b"), 2, first=20) == {20, 21}
        third = context(manager, "c")
        manager.settle("c")
        engine.match = broken
        assert load(manager, worker, third, 2, first=20) == {20, 21}
        engine.save = broken
        save(manager, worker, asked, 4, job=1)
        assert manager.lookup(HASHES[0], context(manager, "d")) is LookupResult.MISS
        engine.contains = broken
        assert manager.prepare_store(HASHES[:8], asked).keys_to_store == []
        assert engine.metrics.get("adapter_errors", adapter="vllm") == 5
        counted = manager.get_stats().reduce()
        assert counted[vllm_attachment.ERRORS] == 5
        assert counted[vllm_attachment.UNFILLED] == 4


def errors_without_end_leave_the_engine_alone() -> None:
    with both(pages()) as (manager, worker):
        engine = manager.attachment.engine
        asked = context(manager, "a")
        match, engine.match = engine.match, broken
        for number in range(vllm_attachment.ERRORS_MAX):
            context(manager, f"{number}")
        assert looked_up(manager, asked) == found(0)
        assert engine.metrics.get("adapter_errors", adapter="vllm") == vllm_attachment.ERRORS_MAX
        assert not manager.attachment.serves
        engine.match = match
        manager.attachment.tried()  # what a look-up says after a pause
        assert manager.attachment.serves


def what_is_sooner_computed_is_not_loaded() -> None:
    step = SimpleNamespace(
        num_scheduled_tokens={"b": 6 * BLOCK_TOKENS},
        scheduled_cached_reqs=None,
        scheduled_new_reqs=[SimpleNamespace(num_computed_tokens=0)],
    )
    for seconds, hits in ((1e-9, 0), (1e3, 6)):
        with both(pages()) as (manager, worker):
            save(manager, worker, context(manager, "a"), 6)
            context(manager, "b", num_prompt_tokens=6 * BLOCK_TOKENS)
            manager.settle("b")
            prefill = manager.measures(step)
            assert prefill == Prefill("", 0, 6 * BLOCK_TOKENS)
            for number in range(8):
                worker.observe(prefill, seconds)
                load(manager, worker, context(manager, f"{number}"), 6, first=20)
            assert looked_up(manager, context(manager, "c")) == found(hits)
            step.num_scheduled_tokens["a"] = 1  # another's token is computed in the same step
            assert manager.measures(step) is None
            del step.num_scheduled_tokens["a"]


def what_is_stored_is_told() -> None:
    manager = adapter.KVEngineOffloadingSpec(config(enable_kv_cache_events=True)).get_manager()
    worker = adapter.KVEngineOffloadingSpec(config()).get_worker(canonical(pages()))
    try:
        save(manager, worker, context(manager, "a"), 4)
        (event,) = manager.take_events()
        assert (event.keys, event.removed) == (HASHES[:4], False)
        assert list(manager.take_events()) == []
    finally:
        worker.shutdown()
        manager.shutdown()


def a_reset_forgets() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context(manager, "a"), 3)
        manager.reset_cache()
        second = context(manager, "b")
        assert looked_up(manager, second) == found(0)
        save(manager, worker, second, 3, job=1)
        assert looked_up(manager, context(manager, "c")) == found(3)


def adapters_and_media_are_told_apart_by_content() -> None:
    with both(pages()) as (manager, worker), tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "adapter_model.safetensors")
        weights.write_bytes(b"one")

        def lora(number: int, place: str = folder) -> Any:
            return SimpleNamespace(
                lora_name="x", lora_path=place, lora_int_id=number, load_inplace=False
            )

        save(manager, worker, context(manager, "a", lora_request=lora(1)), 6)
        assert looked_up(manager, context(manager, "b", lora_request=lora(1))) == found(6)
        assert looked_up(manager, context(manager, "c")) == found(0)
        moved = Path(folder, "copy")
        moved.mkdir()
        shutil.copy(weights, moved)
        of_copy = context(manager, "d", lora_request=lora(2, str(moved)))
        assert looked_up(manager, of_copy) == found(6)
        weights.write_bytes(b"two")
        # vLLM may have the old ones or the new ones in this place.
        assert looked_up(manager, context(manager, "e", lora_request=lora(1))) == found(0)
        assert looked_up(manager, context(manager, "f", lora_request=lora(3))) == found(0)
        elsewhere = context(manager, "g", lora_request=lora(4, "a/b"))
        assert looked_up(manager, elsewhere) == found(0)
        assert manager.prepare_store(HASHES, elsewhere).keys_to_store == []

        def media(name: str) -> list[Any]:
            return [SimpleNamespace(mm_hash=name, identifier=name)]

        save(manager, worker, context(manager, "h"), 6, job=1)
        by_content = context(manager, "i", mm_features=media("0" * 64))
        assert looked_up(manager, by_content) == found(6)
        by_choice = context(manager, "j", mm_features=media("mine"))
        assert looked_up(manager, by_choice) == found(0)
        assert manager.prepare_store(HASHES, by_choice).keys_to_store == []


def groups_are_kept_apart() -> None:
    """Full attention and a window: two groups, of their own blocks in the same arrays."""
    arrays = pages()
    groups = (
        OffloadingGroupConfig(BLOCK_TOKENS, ("a", "b", "c"), 0),
        OffloadingGroupConfig(BLOCK_TOKENS, ("d", "e", "f"), 1),
    )
    facts = replace(FACTS, windowed=frozenset({1}))
    changed = config(groups=groups, extra={adapter.FACTS: facts})
    manager = adapter.KVEngineOffloadingSpec(changed).get_manager()
    caches = canonical(arrays)
    caches.group_data_refs *= 2
    worker = adapter.KVEngineOffloadingSpec(changed).get_worker(caches)
    windowed = [bytes(make_offload_key(key[:-4], 1)) for key in HASHES]

    def two(name: str) -> ReqContext:
        asked = context(manager, name)
        for index, key in enumerate(windowed):
            asked.set_offload_key_position(key, (index + 1) * BLOCK_TOKENS)
        return asked

    try:
        asked = two("a")
        keys = HASHES[:6] + windowed[1:2] + windowed[4:6]
        output = manager.prepare_store(keys, asked)
        assert output.keys_to_store == keys
        assert [len(run.keys) for run in output.store_spec.runs] == [6, 1, 2]
        assert worker.submit_store(1, cache_blocks(list(range(9))), output.store_spec)
        worker.wait({1})
        worker.get_finished()
        manager.complete_store(set(keys), asked)
        asked = two("b")
        assert looked_up(manager, asked) == found(6)
        hits = [
            index for index, key in enumerate(windowed) if manager.lookup(key, asked).name == "HIT"
        ]
        assert hits == [1, 4, 5]
        blocks = manager.prepare_load(HASHES[:6] + windowed[4:6], asked)
        assert worker.submit_load(2, blocks, cache_blocks(list(range(20, 28))))
        worker.wait({2})
        worker.get_finished()
        manager.complete_load(set(), asked)
        for array in arrays:
            assert (array[20:26] == array[:6]).all()
            assert (array[26:28] == array[7:9]).all()
        assert worker.take_failed() == set()
        manager.attachment.engine.load = broken
        blocks = manager.prepare_load(HASHES[:6], asked)
        worker.submit_load(3, blocks, cache_blocks(list(range(20, 26))))
        worker.get_finished()
        assert worker.take_unfilled() == set()
        assert worker.take_failed() == {"b"}
    finally:
        worker.shutdown()
        manager.shutdown()


def a_fork_shares_nothing() -> None:
    with both(pages()):
        child = os.fork()
        if not child:
            os._exit(len(adapter._attachments))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refused(kind: type[Exception], words: str, make: Callable[[], object]) -> None:
    try:
        make()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def what_does_not_fit_is_refused() -> None:
    spec = adapter.KVEngineOffloadingSpec
    for words, changed in (
        ("set kv_connector to 'KVEngineConnector'", {"extra": {adapter.FACTS: None}}),
        ("has no 'url'", {"extra": {"url": None}}),
        ("expected 1", {"world_size": 2}),
        ("expected 1", {"blocks_per_chunk": 4}),
    ):
        refused(ConfigError, words, lambda changed=changed: spec(config(**changed)))
    refused(ConfigError, "ftp", spec(config(extra={"url": "ftp://x"})).get_manager)
    assert not adapter._attachments
    arrays = [*pages(), pages()[0][:, 1:]]
    uneven = canonical(arrays)
    refused(ModelNotSupported, "expected one size", lambda: spec(config()).get_worker(uneven))
    assert not adapter._attachments


def connector(**changed: Any) -> Callable[[], object]:
    transfer = SimpleNamespace(
        kv_load_failure_policy=changed.get("policy", "recompute"),
        kv_connector_extra_config=changed.get("extra", {}),
    )
    vllm_config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(distributed_executor_backend=changed.get("backend", "uni")),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=changed.get("algorithm", "sha256")),
        scheduler_config=SimpleNamespace(async_scheduling=True),
        lora_config=changed.get("lora"),
        model_config=None,
    )
    groups = [SimpleNamespace(kv_cache_spec=object())] * changed.get("groups", 1)
    kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
    return lambda: adapter.KVEngineConnector(vllm_config, None, kv_cache_config)


def what_no_key_tells_apart_is_refused() -> None:
    refused(ConfigError, "expected 'recompute'", connector(policy="fail"))
    refused(ConfigError, "expected 'uni'", connector(backend="mp"))
    refused(ConfigError, "sha256_cbor", connector(algorithm="xxhash"))
    refused(ConfigError, "between_steps", connector(extra={"load": "later"}))
    refused(ConfigError, "async_scheduling=False", connector(extra={"load": "by_layer"}))
    refused(ModelNotSupported, "groups of object", connector(groups=2))


TIER = {"url": "mem://?size=16M", "revision": "one"}


def tier(rows: np.ndarray, **settings: Any) -> Any:
    """A tier as vLLM's factory makes it from a configuration."""
    changed = {"type": "KVEngineTier", "module_path": "kvengine.adapters.vllm_tier", **settings}
    return SecondaryTierFactory.create_secondary_tier(
        changed, memoryview(rows), SimpleNamespace(config=config())
    )


def job(number: int, keys: list[bytes], chunks: list[int], asked: ReqContext, load: bool) -> Any:
    return TransferJob(number, keys, np.array(chunks), load, asked)


def positions(name: str) -> ReqContext:
    found = ReqContext(name)
    for index, key in enumerate(HASHES):
        found.set_offload_key_position(key, (index + 1) * BLOCK_TOKENS)
    return found


def a_tier_keeps_chunks() -> None:
    rows = np.random.default_rng(5).integers(-128, 128, (BLOCKS, 3 * PAGE_BYTES), dtype=np.int8)
    found, asked = tier(rows, **TIER), positions("a")
    try:
        assert found.lookup(HASHES[0], asked) is LookupResult.MISS
        stored = [*range(3), 5]
        keys = [HASHES[index] for index in stored]
        found.submit_store(job(1, keys, stored, asked, False))
        found.drain_jobs()
        assert [(each.job_id, each.success) for each in found.get_finished_jobs()] == [(1, True)]
        hits = [index for index, key in enumerate(HASHES) if found.lookup(key, asked).name == "HIT"]
        assert hits == stored
        before = rows.copy()
        found.submit_load(job(2, [*keys, HASHES[7]], [20, 21, 22, 23, 24], asked, True))
        found.drain_jobs()
        (result,) = found.get_finished_jobs()
        assert not result.success
        assert result.successful_keys == keys
        assert (rows[20:24] == before[stored]).all()
        assert (rows[24] == before[24]).all()
        found.attachment.engine.load = broken
        found.submit_load(job(3, keys, [20, 21, 22, 23], asked, True))
        assert [each.success for each in found.get_finished_jobs()] == [False]
        assert found.get_stats().reduce() == {vllm_attachment.ERRORS: 1}
    finally:
        found.shutdown()
    for missing in TIER:
        settings = {name: value for name, value in TIER.items() if name != missing}
        refused(
            ConfigError, f"has no {missing!r}", lambda settings=settings: tier(rows, **settings)
        )


def a_policy_evicts() -> None:
    """vLLM's own manager over our policy: as many chunks as it has, and never one in use."""
    manager = CPUOffloadingManager(8, "KVEngineCachePolicy", "kvengine.adapters.vllm_policy")
    first, second = positions("a"), positions("b")
    for asked, keys in ((first, HASHES[:6]), (second, HASHES[6:10])):
        manager.on_new_request(asked)
        if asked is second:  # the two that the other request does not need
            manager.prepare_load(HASHES[:4], first)
        output = manager.prepare_store(keys, asked)
        assert output.keys_to_store == keys
        manager.complete_store(keys, asked)
        manager.on_request_finished(asked)
    assert set(output.evicted_keys) == {HASHES[4], HASHES[5]}
    third = positions("c")
    manager.on_new_request(third)
    assert manager.prepare_store(HASHES[10:16], third) is None  # four are being loaded
    manager.complete_load(HASHES[:4], first)
    held = [key for key in HASHES if manager.lookup(key, third) is LookupResult.HIT]
    assert held == HASHES[:4] + HASHES[6:10]
    manager._policy._policy.victims = broken
    output = manager.prepare_store(HASHES[10:16], third)
    assert len(output.evicted_keys) == 6
    manager.complete_store(HASHES[10:16], third)
    manager.reset_cache()
    assert manager.lookup(HASHES[10], third) is LookupResult.MISS


def weights_are_told_apart() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "first")
        place.mkdir()
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(bytes(2 * checkpoint.SMALL_BYTES))
        moved = shutil.copytree(place, Path(folder, "second"))

        def revision(found: Path) -> str:
            model = SimpleNamespace(model=str(found), hf_config=SimpleNamespace())
            return vllm_identity.weights_revision(model)

        before = revision(place)
        assert revision(moved) == before
        (moved / "config.json").write_text("[]")
        assert revision(moved) != before
        os.utime(place / "model.safetensors", ns=(1, 1))
        assert revision(place) != before
        refused(ConfigError, "set 'revision'", lambda: revision(Path(folder, "third")))
    hub = SimpleNamespace(model="a/b", hf_config=SimpleNamespace(_commit_hash="c0ffee"))
    assert vllm_identity.weights_revision(hub) == "commit:c0ffee"


CHECKS = (
    what_is_saved_is_loaded,
    a_prompt_is_looked_up_at_once,
    a_part_of_a_prompt_is_loaded,
    what_is_held_is_not_saved_again,
    what_is_lost_is_reported_and_not_asked_again,
    what_was_computed_with_unfilled_blocks_is_not_saved,
    layers_arrive_in_a_step,
    an_error_is_a_counted_miss,
    errors_without_end_leave_the_engine_alone,
    what_is_sooner_computed_is_not_loaded,
    what_is_stored_is_told,
    a_reset_forgets,
    adapters_and_media_are_told_apart_by_content,
    groups_are_kept_apart,
    a_fork_shares_nothing,
    what_does_not_fit_is_refused,
    what_no_key_tells_apart_is_refused,
    a_tier_keeps_chunks,
    a_policy_evicts,
    weights_are_told_apart,
)


def main() -> None:
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = "good"
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
