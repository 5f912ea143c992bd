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
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvengine.adapters import vllm as adapter
from kvengine.adapters import vllm_halves, vllm_identity
from kvengine.errors import ConfigError, ModelNotSupported

LAYERS, BLOCKS, PAGE_BYTES, BLOCK_TOKENS = 3, 32, 4096, 16
HASHES = [
    bytes(make_offload_key(sha256(b"%d" % index).digest(), 0)) for index in range(BLOCKS // 2)
]
FACTS = vllm_identity.Facts("model", "revision", "auto", "rope", "vllm/sha256/seed", "order")


def config(**changed: Any) -> OffloadingConfig:
    extra = {"url": "mem://?size=16M", adapter.FACTS: FACTS, **changed.pop("extra", {})}
    settings: dict[str, Any] = {
        "groups": (OffloadingGroupConfig(BLOCK_TOKENS, ("a", "b", "c"), 0),),
        "worker_kv_bytes_per_block": LAYERS * PAGE_BYTES,
        "enable_kv_cache_events": False,
        "extra_config": extra,
        "engine_id": "engine",
        "model": OffloadingModelConfig("model", "float32"),
        "cache": OffloadingCacheConfig(BLOCK_TOKENS, changed.pop("blocks_per_chunk", 1)),
        "parallel": OffloadingParallelConfig(
            0, changed.pop("world_size", 1), 1, 1, 1, 1, 0, 1, None, True
        ),
    }
    return OffloadingConfig(**settings, **changed)


def context(name: str) -> ReqContext:
    found = ReqContext(name)
    for index, key in enumerate(HASHES):
        found.set_offload_key_position(key, (index + 1) * BLOCK_TOKENS)
    return found


def pages() -> list[np.ndarray]:
    source = np.random.default_rng(5)
    return [source.integers(-128, 128, (BLOCKS, PAGE_BYTES), dtype=np.int8) for _ in range(LAYERS)]


@contextmanager
def both(arrays: list[np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """The two halves over one engine in memory, as vLLM makes them: a spec for each."""
    manager = adapter.KVEngineOffloadingSpec(config()).get_manager()
    tensors = [SimpleNamespace(tensor=array) for array in arrays]
    spec = adapter.KVEngineOffloadingSpec(config())
    worker = spec.get_worker(SimpleNamespace(tensors=tensors))
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
    return worker.take_unfilled()


def what_is_saved_is_loaded() -> None:
    arrays = pages()
    with both(arrays) as (manager, worker):
        assert manager.lookup(HASHES[0], context("a")) is LookupResult.MISS
        save(manager, worker, context("a"), 6)
        asked = context("b")
        assert [manager.lookup(key, asked) for key in HASHES[:6]] == [LookupResult.HIT] * 6
        assert manager.lookup(HASHES[6], asked) is LookupResult.MISS
        blocks = manager.prepare_load(HASHES[:6], asked)
        assert manager.get_load_source(HASHES[5], asked) is CacheHitSource.HOST
        manager.complete_load(set(HASHES[:6]), asked)
        assert blocks.lease.blocks == 6
        assert load(manager, worker, asked, 6, first=20) == set()
        for array in arrays:
            assert (array[20:26] == array[:6]).all()
        assert manager.get_stats() is None


def what_is_held_is_not_saved_again() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context("a"), 4)
        output = manager.prepare_store(HASHES[:8], context("b"))
        assert output.keys_to_store == HASHES[4:8]
        assert manager.prepare_store(HASHES[:8], context("c")).keys_to_store == []
        assert manager.lookup(HASHES[5], context("c")) is LookupResult.HIT_PENDING
        manager.complete_store(set(HASHES[4:8]), context("b"))
        assert manager.lookup(HASHES[5], context("c")) is LookupResult.MISS


def what_is_lost_is_reported_and_not_asked_again() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context("a"), 6)
        asked = context("b")
        assert manager.lookup(HASHES[5], asked) is LookupResult.HIT
        engine = manager.attachment.engine
        assert engine.drop(manager.attachment.keys([HASHES[2]], 2, None)) == 1
        assert load(manager, worker, asked, 6, first=20) == {22, 23, 24, 25}
        assert worker.take_unfilled() == set()
        assert manager.lookup(HASHES[0], asked) is LookupResult.MISS
        assert manager.lookup(HASHES[0], context("c")) is LookupResult.HIT
        assert manager.get_stats().reduce() == {vllm_halves.UNFILLED: 4}


def broken(*_: Any, **__: Any) -> Any:
    raise OSError("broken")


def an_error_is_a_counted_miss() -> None:
    with both(pages()) as (manager, worker):
        engine, asked = manager.attachment.engine, context("a")
        save(manager, worker, asked, 2)
        engine.load = broken
        assert load(manager, worker, context("b"), 2, first=20) == {20, 21}
        engine.match = broken
        assert load(manager, worker, context("c"), 2, first=20) == {20, 21}
        engine.save = broken
        save(manager, worker, asked, 4, job=1)
        assert manager.lookup(HASHES[3], asked) is LookupResult.MISS
        engine.contains = broken
        assert manager.lookup(HASHES[0], asked) is LookupResult.MISS
        assert manager.prepare_store(HASHES[:8], asked).keys_to_store == []
        assert engine.metrics.get("adapter_errors", adapter="vllm") == 5
        assert manager.get_stats().reduce() == {vllm_halves.ERRORS: 5, vllm_halves.UNFILLED: 4}
        for _ in range(2 * vllm_halves.ERRORS_MAX):
            assert manager.lookup(HASHES[0], asked) is LookupResult.MISS
        assert engine.metrics.get("adapter_errors", adapter="vllm") == vllm_halves.ERRORS_MAX


def a_reset_forgets() -> None:
    with both(pages()) as (manager, worker):
        save(manager, worker, context("a"), 3)
        manager.reset_cache()
        assert manager.lookup(HASHES[0], context("b")) is LookupResult.MISS
        save(manager, worker, context("b"), 3, job=1)
        assert manager.lookup(HASHES[0], context("c")) is LookupResult.HIT


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
    uneven = SimpleNamespace(tensors=[SimpleNamespace(tensor=array) for array in arrays])
    refused(ModelNotSupported, "expected one size", lambda: spec(config()).get_worker(uneven))
    assert not adapter._attachments


def connector(**changed: Any) -> Callable[[], object]:
    transfer = SimpleNamespace(
        kv_load_failure_policy=changed.get("policy", "recompute"), kv_connector_extra_config={}
    )
    vllm_config = SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(distributed_executor_backend=changed.get("backend", "uni")),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=changed.get("algorithm", "sha256")),
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
    refused(ModelNotSupported, "LoRA", connector(lora=object()))
    refused(ModelNotSupported, "2 KV cache groups", connector(groups=2))
    refused(ModelNotSupported, "full attention", connector())


def weights_are_told_apart() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "first")
        place.mkdir()
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(bytes(2 * vllm_identity.SMALL_BYTES))
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
    what_is_held_is_not_saved_again,
    what_is_lost_is_reported_and_not_asked_again,
    an_error_is_a_counted_miss,
    a_reset_forgets,
    a_fork_shares_nothing,
    what_does_not_fit_is_refused,
    what_no_key_tells_apart_is_refused,
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
