"""Checks of the LMCache plug-in against LMCache's own backend, manager and memory.

    python tests/serving/lmcache_storage.py

Run by tests/test_lmcache.py. The last line of the output is `RESULT {name: "good", or the error}`.
"""

import asyncio
import json
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import torch  # noqa: E402
from lmcache.utils import CacheEngineKey  # noqa: E402
from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402
from lmcache.v1.metadata import LMCacheMetadata  # noqa: E402
from lmcache.v1.storage_backend.connector import CreateConnector  # noqa: E402
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend  # noqa: E402
from lmcache.v1.storage_backend.remote_backend import RemoteBackend  # noqa: E402

from kvengine.adapters import lmcache as adapter  # noqa: E402
from kvengine.errors import ConfigError  # noqa: E402

LAYERS, CHUNK, HEADS, DIM = 4, 64, 2, 32
PLUGIN = "remote_storage_plugin.kvengine."


def config(url: str = "mem://?size=16M", **changes: Any) -> Any:
    settings = {
        "url": url,
        "revision": "one",
        "accept_64_bit_names": True,
        "module_path": adapter.__name__,
        "class_name": "KVEngineAdapter",
    }
    algorithm = changes.pop("algorithm", "sha256_cbor")
    settings |= changes
    return LMCacheEngineConfig.from_defaults(
        chunk_size=CHUNK,
        local_cpu=False,
        max_local_cpu_size=0.05,
        remote_serde="naive",
        remote_storage_plugins=["kvengine"],
        pre_caching_hash_algorithm=algorithm,
        extra_config={PLUGIN + name: value for name, value in settings.items()},
    )


def metadata() -> Any:
    return LMCacheMetadata(
        model_name="model",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, CHUNK, HEADS, DIM),
        chunk_size=CHUNK,
    )


def key(number: int, **more: Any) -> Any:
    return CacheEngineKey("model", 1, 0, number, torch.bfloat16, **more)


@contextmanager
def backend_of(chosen: Any) -> Iterator[tuple[Any, Any]]:
    """LMCache's remote backend over the plug-in, and the memory that it takes objects from."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    about = metadata()
    memory = LocalCPUBackend(chosen, about, dst_device="cpu")
    backend = RemoteBackend(chosen, about, loop, memory, "cpu", plugin_name="kvengine")
    assert backend.connection is not None
    try:
        yield backend, memory
    finally:
        asyncio.run_coroutine_threadsafe(backend.connection.close(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def engine_of(backend: Any) -> Any:
    connector = backend.connection
    return getattr(connector, "_connector", connector).engine


def chunk(memory: Any, seed: int, tokens: int = CHUNK) -> Any:
    """A memory object of LMCache's, filled with noise."""
    shape = torch.Size([2, LAYERS, tokens, HEADS * DIM])
    made = memory.allocate(shape, torch.bfloat16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made.tensor.copy_(noise.bfloat16())
    return made


def put(backend: Any, number: int, made: Any) -> None:
    future = backend.submit_put_task(key(number), made)
    future.result(30)


def what_is_put_is_got() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        url = f"mem://?size=16M | file://{folder}?size=64M"
        with backend_of(config(url)) as (backend, memory):
            made = [chunk(memory, n) for n in range(3)]
            assert not backend.contains(key(0))
            for number, each in enumerate(made):
                put(backend, number, each)
            assert backend.batched_contains([key(0), key(1), key(2), key(3)]) == 3
            wanted = [each.tensor.clone() for each in made]
        with backend_of(config(url)) as (backend, memory):  # another process, as it were
            for number, tensor in enumerate(wanted):
                found = backend.get_blocking(key(number))
                assert torch.equal(found.tensor, tensor)
                found.ref_count_down()
            assert backend.get_blocking(key(9)) is None
            assert backend.remove(key(1)) and not backend.contains(key(1))
        with backend_of(config(url, revision="two")) as (backend, memory):
            assert not backend.contains(key(0))
    finally:
        shutil.rmtree(folder)


def names_differ_by_all_that_lmcache_says() -> None:
    with backend_of(config()) as (backend, memory):
        put(backend, 1, chunk(memory, 1))
        assert backend.contains(key(1))
        assert not backend.contains(key(1, request_configs={"lmcache.tag.user": "b"}))
        assert not backend.contains(CacheEngineKey("model", 1, 1, 1, torch.bfloat16))
        assert not backend.contains(CacheEngineKey("other", 1, 0, 1, torch.bfloat16))


def partial_chunks_and_damage_are_misses() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with backend_of(config(f"mem://?size=16M | file://{folder}?size=64M")) as both:
            backend, memory = both
            put(backend, 1, chunk(memory, 1, tokens=10))
            assert not backend.contains(key(1))
            made = chunk(memory, 2)
            put(backend, 2, made)
            engine = engine_of(backend)
            assert engine.flush()
            engine.squeeze(0)
            where = bytes(made.byte_array[5000:5016])
            (path,) = [p for p in folder.rglob("*") if p.is_file() and where in p.read_bytes()]
            with path.open("r+b") as file:
                file.seek(path.read_bytes().index(where))
                file.write(bytes([where[0] ^ 1]))
            assert backend.get_blocking(key(2)) is None
            assert engine.stats()["corrupt_blocks"] == 1
            assert engine.metrics.get("adapter_errors", adapter="lmcache") == 0
    finally:
        shutil.rmtree(folder)


def wrong_settings_are_named() -> None:
    for changes, says in (
        ({"url": None}, "no remote_storage_plugin.kvengine.url"),
        ({"revision": ""}, "revision"),
        ({"accept_64_bit_names": False}, "64 bits"),
        ({"algorithm": "builtin"}, "pre_caching_hash_algorithm"),
    ):
        chosen = config(**changes)
        memory = LocalCPUBackend(chosen, metadata(), dst_device="cpu")
        loop = asyncio.new_event_loop()
        try:
            CreateConnector(
                "plugin://kvengine", loop, memory, chosen, metadata(), plugin_name="kvengine"
            )
        except ConfigError as error:
            assert says in str(error), error
        else:
            raise AssertionError(f"nothing was refused: {says}")
        finally:
            loop.close()


CHECKS: tuple[Callable[[], None], ...] = (
    what_is_put_is_got,
    names_differ_by_all_that_lmcache_says,
    partial_chunks_and_damage_are_misses,
    wrong_settings_are_named,
)


def main() -> None:
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = "good"
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(f"RESULT {json.dumps(results)}", flush=True)
    os._exit(0)  # LMCache's own threads do not end


if __name__ == "__main__":
    main()
