"""Checks of the SGLang adapter against SGLang's own base class, factory and host pools.

    python tests/serving/sglang_storage.py

Run by tests/test_sglang.py. The last line of the output is `RESULT {name: "good", or the error}`.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang_imports

sglang_imports.install()

import torch  # noqa: E402
from sglang.srt.mem_cache.device_pool_info import (  # noqa: E402
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
)
from sglang.srt.mem_cache.pool_host.mha import (  # noqa: E402
    AsymmetricMHATokenToKVPoolHost,
    MHATokenToKOnlyPoolHost,
    MHATokenToKVPoolHost,
)
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402
from sglang.srt.mem_cache.utils import get_storage_hash_str  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from kvengine.adapters import sglang as adapter  # noqa: E402
from kvengine.adapters.guard import Guard  # noqa: E402
from kvengine.adapters.sglang_identity import describe  # noqa: E402
from kvengine.adapters.sglang_pools import parts_of, place_of  # noqa: E402
from kvengine.errors import ConfigError, LayoutError, ModelNotSupported  # noqa: E402

PAGE, TOKENS, LAYERS, HEADS, DIM, PAGES = 16, 256, 4, 2, 64, 5
KEYS = get_storage_hash_str(list(range(PAGE * PAGES)), None, PAGE)
MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head", "page_unified")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_unified")
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.uint64)


def pool_of(
    layout: str,
    heads: int = HEADS,
    layers: int = LAYERS,
    dims: tuple[int, int] = (DIM, DIM),
    start: int = 0,
    kind: Any = MHATokenToKVPoolHost,
    **more: Any,
) -> Any:
    """A host pool of SGLang's own, filled with noise."""
    k, v = ([noise(TOKENS, heads, dim) for _ in range(layers)] for dim in dims)
    buffers = KVBuffers(
        k=tuple(k),
        v=tuple(v),
        k_data_ptrs=addresses(k),
        v_data_ptrs=addresses(v),
        layout=KVBufferLayout.NHD,
    )
    info = MHABufferInfo(
        buffers=buffers,
        page_size=PAGE,
        head_num=heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=torch.bfloat16,
        device=CPU,
    )
    pool = kind(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=TOKENS,
        start_layer=start,
        end_layer=start + layers,
        **more,
    )
    fill(pool, 1)
    return pool


def index_of(anchor: Any, layout: str) -> Any:
    """A pool of SGLang's whose inside the adapter does not know: an index, without values."""
    rows = [noise(TOKENS, 1, DIM) for _ in range(LAYERS)]
    device = SimpleNamespace(
        store_dtype=torch.bfloat16,
        start_layer=0,
        end_layer=LAYERS,
        head_num=1,
        head_dim=DIM,
        layer_num=LAYERS,
        k_buffer=rows,
        device=CPU,
    )
    pool = MHATokenToKOnlyPoolHost(device, anchor, layout, pin_memory=False)
    pool.k_buffer.copy_(noise(*pool.k_buffer.shape, seed=2))
    return pool


def latent_of(layout: str) -> Any:
    rows = [noise(TOKENS, 1, DIM + 8) for _ in range(LAYERS)]
    info = MLABufferInfo(
        buffers=tuple(rows),
        data_ptrs=addresses(rows),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=DIM,
        qk_rope_head_dim=8,
        kv_cache_dim=DIM + 8,
        dtype=torch.bfloat16,
        device=CPU,
    )
    pool = MLATokenToKVPoolHost(
        info,
        2.0,
        0,
        PAGE,
        layout,
        pin_memory=False,
        device="cpu",
        device_capacity_tokens=TOKENS,
        start_layer=0,
        end_layer=LAYERS,
        target_layer_num=LAYERS,
    )
    fill(pool, 1)
    return pool


def buffers_of(pool: Any) -> tuple[torch.Tensor, ...]:
    return pool.kv_buffer if isinstance(pool.kv_buffer, tuple) else (pool.kv_buffer,)


def fill(pool: Any, seed: int) -> None:
    for buffer in buffers_of(pool):
        buffer.copy_(noise(*buffer.shape, seed=seed))


def config(latent: bool = False, rank: int = 0, size: int = 1, **extra: Any) -> Any:
    extra = {"url": "mem://?size=32M", "revision": "one", **extra}
    dynamic = {"module_path": adapter.__name__, "class_name": "KVEngineStorage"}
    extra |= {"backend_name": "kvengine", "interface_v1": 1, **dynamic}
    return HiCacheStorageConfig(
        tp_rank=rank,
        tp_size=size,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=latent,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="model",
        extra_config=extra,
    )


@contextmanager
def storage_of(pool: Any, **settings: Any) -> Iterator[Any]:
    """Made as SGLang's controller makes it."""
    made = StorageBackendFactory.create_backend("dynamic", config(**settings), pool)
    assert isinstance(made, HiCacheStorage)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    try:
        yield made
        assert made.engine.metrics.get("adapter_errors", adapter="sglang") == 0
    finally:
        made.close()


def page(pool: Any, index: int) -> list[torch.Tensor]:
    """The values of one page, layer by layer, [tokens, heads, dim], whatever the layout."""
    (whole,) = parts_of(pool, place_of(config()))
    found = []
    for item in whole.arrays:
        found += [each[index // PAGE].clone() for each in (item if type(item) is tuple else [item])]
    return found


def same(source: Any, taken: torch.Tensor, target: Any, given: torch.Tensor) -> bool:
    starts = zip(taken[::PAGE].tolist(), given[::PAGE].tolist(), strict=True)
    return all(
        torch.equal(a, b)
        for one, other in starts
        for a, b in zip(page(source, one), page(target, other), strict=True)
    )


def round_trip(pools: list[Any], **settings: Any) -> None:
    """What is saved from each pool fills every other, bit for bit."""
    for source in pools:
        with storage_of(source, **settings) as storage:
            assert storage.batch_exists(KEYS) == 0
            taken = source.alloc(PAGES * PAGE)
            assert storage.batch_set_v1(KEYS, taken) == [True] * PAGES
            assert storage.batch_exists([*KEYS, "00" * 32]) == PAGES
            for target in pools:
                storage.register_mem_pool_host(target)
                given = target.alloc(PAGES * PAGE)
                before = [buffer.clone() for buffer in buffers_of(target)]
                for buffer in buffers_of(target) if target is not source else ():
                    buffer.fill_(-1)
                assert storage.batch_get_v1(KEYS, given) == [True] * PAGES
                assert same(source, taken, target, given)
                if target is source:
                    check_untouched(target, before, given)
                target.free(given)


def check_untouched(pool: Any, before: list[torch.Tensor], given: torch.Tensor) -> None:
    """No byte of other pages has changed."""
    for buffer, old in zip(buffers_of(pool), before, strict=True):
        changed = (buffer != old).sum().item()
        assert changed <= buffer.numel() * len(given) / pool.size


def mha_pages_fit_every_layout() -> None:
    round_trip([pool_of(layout) for layout in MHA_LAYOUTS])


def k_and_v_may_differ() -> None:
    kind = AsymmetricMHATokenToKVPoolHost
    layouts = ("page_first", "page_first_direct")
    round_trip([pool_of(layout, dims=(DIM, 32), kind=kind) for layout in layouts])


def latents_fit_every_layout() -> None:
    round_trip([latent_of(layout) for layout in MLA_LAYOUTS], latent=True)


class Copies(TorchDispatchMode):
    """Counts the elements that torch operations have written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.written += result.numel()
        return result


def bytes_move_once_each_way() -> None:
    """The engine reads and writes the pool's own pages: no torch copy, no buffer beside frames."""
    for layout in MHA_LAYOUTS:
        pool = pool_of(layout)
        with storage_of(pool, options={"lossless": False, "threads": 1}) as storage:
            storage.engine.warm()
            indices = pool.alloc(PAGES * PAGE)
            (stored,) = storage._stored["kv"]
            moves = stored.cache.moves(*arguments_of(indices))
            spans = runs_of(moves)
            assert sum(size for _, size in spans) == PAGES * pool.get_size_per_token() * PAGE
            if layout != "page_unified":  # the pool gives no addresses of it
                addresses, sizes = pool.get_page_buffer_meta(indices)
                assert joined(spans) == joined(zip(addresses, sizes, strict=True))
            tracemalloc.start()
            with Copies() as copies:
                assert all(storage.batch_set_v1(KEYS, indices))
                assert all(storage.batch_get_v1(KEYS, indices))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            page_bytes = pool.get_size_per_token() * PAGE
            assert copies.written <= 2 * len(indices), copies.written
            assert peak < PAGES * page_bytes // 2, (peak, page_bytes)
            assert storage.engine.stats()["saved_blocks"] == PAGES


def arguments_of(indices: torch.Tensor) -> tuple[Any, Any, None]:
    table = indices[::PAGE].numpy() // PAGE
    return table * 0, table, None


def runs_of(moves: Any) -> list[tuple[int, int]]:
    """Every run of bytes in the pool that a table of moves reads, (address, nbytes)."""
    found = []
    for base, group, outer, outer_step, _, inner, inner_step, _, run, *_ in moves.components:
        for offset in moves.offsets[group].reshape(-1):
            for a in range(outer):
                at = base + offset + a * outer_step
                found += [(int(at + b * inner_step), int(run)) for b in range(inner)]
    return found


def joined(spans: Any) -> list[tuple[int, int]]:
    """Spans in order, those that meet as one."""
    found: list[tuple[int, int]] = []
    for at, size in sorted(spans):
        if found and sum(found[-1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((at, size))
    return found


def pages_through_tensors() -> None:
    """SGLang's generic calls, which copy each page to a tensor of its own, find the same pages."""
    makers = [(pool_of, layout) for layout in MHA_LAYOUTS[:4]]
    for make, layout in [*makers, *((latent_of, layout) for layout in MLA_LAYOUTS[:3])]:
        pool = make(layout)
        with storage_of(pool, latent=make is latent_of) as storage:
            taken, given = pool.alloc(PAGES * PAGE), pool.alloc(PAGES * PAGE)
            values = [pool.get_data_page(int(index)) for index in taken[::PAGE]]
            assert storage.batch_set(KEYS, values)
            assert storage.exists(KEYS[-1]) and not storage.exists("00" * 32)
            assert all(storage.batch_get_v1(KEYS, given))
            assert same(pool, taken, pool, given)
            flat = [pool.get_dummy_flat_data_page() for _ in KEYS]
            for got, sent in zip(storage.batch_get(KEYS, flat), values, strict=True):
                assert torch.equal(got, sent)
            assert storage.batch_get(["00" * 32], flat[:1]) == [None]


def parts_are_shared_by_parallel_degrees() -> None:
    """What two processes have stored, half of the heads each, one with all of them finds."""
    folder = Path(tempfile.mkdtemp())
    try:
        grid = {"url": f"mem://?size=32M | file://{folder}?size=64M", "head_group": 1}
        grid["layer_partition"] = 2
        whole, other = pool_of("page_first"), pool_of("page_head")
        taken = whole.alloc(PAGES * PAGE)
        for rank in range(2):
            half = pool_of("layer_first", heads=1)
            half.kv_buffer.copy_(half_of(whole, rank))
            with storage_of(half, rank=rank, size=2, **grid) as storage:
                assert len(storage._stored["kv"]) == LAYERS // 2
                assert all(storage.batch_set_v1(KEYS, taken))
        with storage_of(other, **grid) as storage:
            assert len(storage._stored["kv"]) == LAYERS // 2 * HEADS
            assert storage.batch_exists(KEYS) == PAGES
            given = other.alloc(PAGES * PAGE)
            assert all(storage.batch_get_v1(KEYS, given))
            assert same(whole, taken, other, given)
        with storage_of(pool_of("page_first"), **{**grid, "layer_partition": 0}) as storage:
            assert storage.batch_exists(KEYS) == 0
    finally:
        shutil.rmtree(folder)


def half_of(pool: Any, rank: int) -> torch.Tensor:
    """One head of a page_first pool, in the order of layer_first."""
    return pool.kv_buffer[:, :, :, rank : rank + 1].transpose(1, 2)


@contextmanager
def daemon() -> Iterator[str]:
    """`kvengine serve` as a process of its own; gives the URL that clients open."""
    folder = Path(tempfile.mkdtemp())
    socket = folder / "kv.sock"
    command = [sys.executable, "-m", "kvengine.cli", "serve", "mem://?size=32M"]
    process = subprocess.Popen([*command, "--socket", str(socket)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().startswith(b"serving")
        yield f"unix://{socket}?timeout_s=20"
    finally:
        process.terminate()
        process.communicate(timeout=30)
        shutil.rmtree(folder)


def processes_of_a_host_share_a_daemon() -> None:
    """Each has an engine of its own over one memory: latents have one writer, heads a part each."""
    with daemon() as url:
        first, second = latent_of("page_first"), latent_of("layer_first")
        taken, given = first.alloc(PAGES * PAGE), second.alloc(PAGES * PAGE)
        with (
            storage_of(first, latent=True, rank=0, size=2, url=url) as writer,
            storage_of(second, latent=True, rank=1, size=2, url=url) as reader,
        ):
            assert reader.batch_set_v1(KEYS, given) == [True] * PAGES
            assert reader.batch_exists(KEYS) == 0
            assert all(writer.batch_set_v1(KEYS, taken))
            assert reader.batch_exists(KEYS) == PAGES
            assert all(reader.batch_get_v1(KEYS, given))
            assert same(first, taken, second, given)
        whole, halves = pool_of("page_first"), [pool_of("page_head", heads=1) for _ in range(2)]
        taken = whole.alloc(PAGES * PAGE)
        with storage_of(whole, url=url, head_group=1) as storage:
            assert all(storage.batch_set_v1(KEYS, taken))
        for rank, half in enumerate(halves):
            given = half.alloc(PAGES * PAGE)
            with storage_of(half, rank=rank, size=2, url=url, head_group=1) as storage:
                assert all(storage.batch_get_v1(KEYS, given))
            expected = half_of(whole, rank)[:, :, taken]
            found = half.kv_buffer.permute(0, 4, 1, 3, 2, 5).flatten(2, 3)[:, :, given]
            assert torch.equal(found, expected)


def latents_have_one_writer() -> None:
    pool = latent_of("page_first")
    with storage_of(pool, latent=True, rank=1, size=2) as storage:
        taken = pool.alloc(PAGES * PAGE)
        assert storage.batch_set_v1(KEYS, taken) == [True] * PAGES
        assert storage.set(KEYS[0], pool.get_data_page(int(taken[0])))
        assert storage.batch_exists(KEYS) == 0
        (part,) = storage._stored["kv"]
        first = parts_of(pool, place_of(config(latent=True, rank=0, size=2)))
        assert part.part.name == first[0].name


def several_pools_at_once() -> None:
    """A window needs its last pages, an indexer of another kind all; the prefix is cut to fit."""
    pool, window = pool_of("page_first"), pool_of("page_first", layers=2)
    index = index_of(pool, "page_first_direct")
    with storage_of(pool) as storage:
        for name, other in (("swa", window), ("indexer", index)):
            storage.register_mem_host_pool_v2(other, name)
        taken = pool.alloc(PAGES * PAGE)
        for other in (window, index):
            other.alloc(PAGES * PAGE)
        tail = taken[PAGE:]
        extra = HiCacheStorageExtraInfo(prefix_keys=KEYS[:1])
        assert all(storage.batch_set_v1(KEYS, taken))
        put = storage.batch_set_v2([PoolTransfer("swa", tail[: 2 * PAGE], keys=KEYS[1:3])], extra)
        assert put == {"swa": [True, True]}
        put = storage.batch_set_v2([PoolTransfer("indexer", taken[: 4 * PAGE], keys=KEYS[:4])])
        assert put == {"indexer": [True] * 4}
        trailing = PoolHitPolicy.TRAILING_PAGES
        wanted = [
            PoolTransfer("swa", keys=KEYS[:2], hit_policy=trailing),
            PoolTransfer("indexer", hit_policy=PoolHitPolicy.ALL_PAGES),
        ]
        found = storage.batch_exists_v2(KEYS, wanted)
        assert (found.kv_hit_pages, found.restorable_prefix_pages) == (3, [3])
        assert found.extra_pool_hit_pages == {"kv": 5, "swa": 3, "indexer": 4}
        assert storage.batch_exists_v2(KEYS, wanted[1:]).kv_hit_pages == 4
        before = index.k_buffer.clone()
        given = window.alloc(2 * PAGE), index.alloc(4 * PAGE)
        got = storage.batch_get_v2(
            [
                PoolTransfer("swa", given[0], keys=KEYS[1:3]),
                PoolTransfer("indexer", given[1], keys=KEYS[:4]),
            ]
        )
        assert got == {"swa": [True, True], "indexer": [True] * 4}
        assert same(window, tail[: 2 * PAGE], window, given[0])
        first = given[1][::PAGE] // PAGE
        pages = index.k_buffer
        assert torch.equal(pages[first], pages[taken[: 4 * PAGE : PAGE] // PAGE])
        assert not torch.equal(pages, before)
        assert storage.batch_get_v2([PoolTransfer("swa", given[0], keys=KEYS[3:5])]) == {
            "swa": [False, False]
        }


def faults_are_misses() -> None:
    pool = pool_of("page_first")
    made = StorageBackendFactory.create_backend("dynamic", config(), pool)
    made.register_mem_pool_host(pool)
    taken = pool.alloc(PAGES * PAGE)
    assert made.batch_set_v1(KEYS, taken[:-1]) == [False] * PAGES
    assert made.batch_get_v1(["short"], taken[:PAGE]) == [False]
    assert made.engine.metrics.get("adapter_errors", adapter="sglang") == 2
    assert all(made.batch_set_v1(KEYS, taken))
    made.clear()
    assert made.batch_exists(KEYS) == 0
    assert all(made.batch_set_v1(KEYS, taken))
    assert made.batch_exists(KEYS) == PAGES
    made.close()
    assert made.batch_exists(KEYS) == 0
    assert made.batch_get_v1(KEYS, taken) == [False] * PAGES


def planted_exceptions_are_misses() -> None:
    """Whatever the engine raises, SGLang hears of a miss; and after a pause of a page again."""
    pool = pool_of("page_first")
    with storage_of(pool) as storage:
        storage.register_mem_host_pool_v2(pool, "swa")
        taken = pool.alloc(PAGES * PAGE)
        assert all(storage.batch_set_v1(KEYS, taken))
        engine, now = storage.engine, [0.0]
        swa = [PoolTransfer("swa", taken, keys=KEYS)]
        calls = (
            (("probe",), lambda: storage.batch_exists(KEYS), 0),
            (("probe",), lambda: storage.exists(KEYS[0]), False),
            (("match", "load"), lambda: storage.batch_get_v1(KEYS, taken), [False] * PAGES),
            (("save",), lambda: storage.batch_set_v1(KEYS, taken), [False] * PAGES),
            (("probe", "contains"), lambda: storage.batch_exists_v2(KEYS, swa).kv_hit_pages, 0),
            (("match", "load"), lambda: storage.batch_get_v2(swa), {"swa": [False] * PAGES}),
            (("save",), lambda: storage.batch_set_v2(swa), {"swa": [False] * PAGES}),
            (("cache", "match"), lambda: storage.get(KEYS[0], pool.get_data_page(0)), None),
            (("cache", "save"), lambda: storage.set(KEYS[0], pool.get_data_page(0)), False),
            (("drop_all",), storage.clear, None),
        )
        for verbs, call, miss in calls:
            for verb in verbs:
                if verb == "load" and miss != [False] * PAGES:
                    continue  # nothing of that pool is held, so nothing is loaded
                storage._guard = Guard(engine, "sglang", lambda: now[0])
                whole = getattr(engine, verb)
                before = engine.metrics.get("adapter_errors", adapter="sglang")
                for error in (MemoryError("planted"), KeyError("planted")):
                    setattr(engine, verb, fail_with(error))
                    assert call() == miss, (verb, call())
                setattr(engine, verb, whole)
                assert engine.metrics.get("adapter_errors", adapter="sglang") == before + 2
        assert storage.batch_exists(KEYS) == PAGES
        engine.metrics = type(engine.metrics)()  # those were planted


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def what_cannot_be_told_apart_is_refused() -> None:
    def refused(error: type[Exception], says: str, verb: Callable[[], object]) -> None:
        try:
            verb()
        except error as given:
            assert says in str(given), given
        else:
            raise AssertionError(f"nothing was refused: {says}")

    def make(**extra: Any) -> Any:
        return adapter.KVEngineStorage(config(**extra), {})

    refused(ConfigError, "no 'url'", lambda: make(url=None))
    refused(ConfigError, "no local files", lambda: make(revision=""))
    refused(ConfigError, "head_group", lambda: make(head_group=-1))
    refused(ConfigError, "choose divisors", lambda: parts_of(pool_of("page_first"), grid(3)))
    loras = SimpleNamespace(lora_paths=["name=/nowhere"])
    refused(ConfigError, "LoRA adapter", lambda: describe(config(), loras))
    strange = index_of(pool_of("page_first"), "layer_first")
    refused(ModelNotSupported, "addresses", lambda: parts_of(strange, grid(0)))
    pool = pool_of("page_first")
    pool.layout = "own"
    refused(ModelNotSupported, "memory layout", lambda: parts_of(pool, grid(0)))
    refused(LayoutError, "not registered", lambda: make()._parts("other"))


def grid(heads: int) -> Any:
    return place_of(config(head_group=heads))


def facts_change_the_names() -> None:
    """Each argument that changes K/V, and each byte of an adapter, is another namespace."""
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "adapter").write_bytes(b"one")
        given = {"kv_cache_dtype": "auto", "lora_paths": [f"name={folder}"]}
        seen = [describe(config(), SimpleNamespace(**given))]
        for name in ("kv_cache_dtype", "quantization", "json_model_override_args"):
            seen.append(describe(config(), SimpleNamespace(**{**given, name: "other"})))
        (folder / "adapter").write_bytes(b"two")
        seen.append(describe(config(), SimpleNamespace(**given)))
        seen.append(describe(config(revision="two"), SimpleNamespace(**given)))
        assert len({repr(each) for each in seen}) == len(seen)
    finally:
        shutil.rmtree(folder)


CHECKS: tuple[Callable[[], None], ...] = (
    mha_pages_fit_every_layout,
    k_and_v_may_differ,
    latents_fit_every_layout,
    bytes_move_once_each_way,
    pages_through_tensors,
    parts_are_shared_by_parallel_degrees,
    processes_of_a_host_share_a_daemon,
    latents_have_one_writer,
    several_pools_at_once,
    faults_are_misses,
    planted_exceptions_are_misses,
    what_cannot_be_told_apart_is_refused,
    facts_change_the_names,
)


def main() -> None:
    wanted = sys.argv[1:]
    results = {}
    for check in CHECKS:
        if wanted and check.__name__ not in wanted:
            continue
        try:
            check()
            results[check.__name__] = "good"
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(f"RESULT {json.dumps(results)}")


if __name__ == "__main__":
    main()
