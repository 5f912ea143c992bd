"""Keeps SGLang's host cache (HiCache) in an engine: its third level, by SGLang's own interface.

    python -m sglang.launch_server --model-path MODEL --enable-hierarchical-cache \\
        --hicache-mem-layout page_first --hicache-storage-backend dynamic \\
        --hicache-storage-backend-extra-config '{
            "backend_name": "kvengine", "module_path": "kvengine.adapters.sglang",
            "class_name": "KVEngineStorage", "interface_v1": 1,
            "url": "mem://?size=16G | file:///var/cache/kv/{rank}?size=100G"}'

More settings beside "url": "options" (a table, as `kvengine.open` takes it), "revision" (a name of
weights that are no local files), "head_group" and "layer_partition" (the grid that servers of
different parallel degrees cut pages along, so that they share them). Where a model has several
processes, the URL is that of the host's daemon (`unix:///PATH/kv.sock`, see `kvengine serve`),
which all of them share; or each has a directory of its own, `{rank}` in the URL standing for its
place. MLA pages, equal in all processes, are written by one of them and read by all, which takes
what they share: a daemon, or a store such as valkey://.

SGLang names the pages and decides what to fetch; this file translates, and nothing else. Bytes move
once each way, between the host pool's own pages and frames. A fault of ours is a counted miss.
Tried with SGLang 0.5.23, whose objects have no types here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolTransferResult
from sglang.srt.runtime_context import get_server_args

import kvengine
from kvengine.adapters.guard import Guard
from kvengine.adapters.sglang_identity import describe
from kvengine.adapters.sglang_pools import Part, parts_of, place_of
from kvengine.cache import PagedCache
from kvengine.errors import ConfigError, LayoutError
from kvengine.keys import BlockKeys, Namespace

if TYPE_CHECKING:
    from kvengine.lease import Bools
    from kvengine.transfer import Transfer

KV = "kv"
SAVE_S, LOAD_S = 30.0, 10.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A part of a pool's pages: what they are called, and where they lie."""

    part: Part
    names: Namespace
    cache: PagedCache


class KVEngineStorage(HiCacheStorage):
    """See the module. Called from SGLang's storage threads; waits for the bytes, and no longer.

    Raises ConfigError, at start, for settings that do not fit, and what `kvengine.open` raises.
    """

    def __init__(self, storage_config: Any, options: dict[str, Any] | None = None) -> None:
        extra = storage_config.extra_config or {}
        if not isinstance(extra.get("url"), str):
            raise ConfigError(
                "--hicache-storage-backend-extra-config has no 'url': give one, such as "
                "'mem://?size=16G | file:///var/cache/kv/{rank}?size=100G'"
            )
        self._config = storage_config
        self._place = place_of(storage_config)
        self._facts = describe(storage_config, _arguments())
        rank = f"{self._place.stage} tp{self._place.rank} dp{storage_config.dp_rank}"
        url = extra["url"].replace("{rank}", rank.replace(" ", "-").replace("/", "of"))
        self.engine = kvengine.open(url, **extra.get("options", {}))
        self._guard = Guard(self.engine, "sglang")
        self._pools: dict[str, Any] = {}
        self._stored: dict[str, list[Stored]] = {}

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool of K/V. Raises ModelNotSupported, LayoutError or ConfigError."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take another pool. Raises ModelNotSupported, LayoutError or ConfigError."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(str(host_pool_name), host_pool)

    # One pool, zero copies

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        return self._guard.guarded(lambda: self._count(keys, extra_info), lambda: 0)

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        return self._got(KV, keys, host_indices, extra_info)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        return self._put(KV, keys, host_indices, extra_info)

    # Several pools

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        return self._guard.guarded(
            lambda: self._exists(keys, pool_transfers or [], extra_info), PoolTransferResult.empty
        )

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {
            each.name: self._got(str(each.name), each.keys or [], each.host_indices, extra_info)
            for each in transfers
        }

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        return {
            each.name: self._put(str(each.name), each.keys or [], each.host_indices, extra_info)
            for each in transfers
        }

    # A page at a time, through tensors of SGLang's: without "interface_v1"

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        good = self._guard.guarded(lambda: self._page(key, target_location, load=True), _none)
        return target_location if good else None

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        if not self._config.is_storage_writer:
            return True
        return self._guard.guarded(lambda: self._page(key, value, load=False), _none)

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        places = target_locations or [None] * len(keys)
        return [self.get(key, place) for key, place in zip(keys, places, strict=True)]

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return all([self.set(key, value) for key, value in zip(keys, values, strict=True)])

    # Keeping house

    def clear(self) -> None:
        """Make all pages of this engine's tenant unreachable."""
        self._guard.guarded(self._renew, lambda: None)

    def close(self) -> None:
        """Write what is committed to the tiers below, and let go of the pools."""
        self._stored.clear()
        self._pools.clear()
        self.engine.close()

    # Inside

    def _register(self, name: str, pool: Any) -> None:
        self._pools[name] = pool
        self._stored[name] = [
            Stored(part, names := self._names(name, part), self.engine.cache(names, part.arrays))
            for part in parts_of(pool, self._place)
        ]

    def _names(self, pool: str, part: Part) -> Namespace:
        facts = self._facts
        return self.engine.namespace(
            model=facts.model,
            revision=facts.revision,
            adapter=facts.adapter,
            layout=part.layout,
            kv_dtype=f"{part.layout.dtype}/{facts.kv_dtype}",
            positional="sglang",
            pool=f"{pool} {part.name}",
            source=facts.source,
        )

    def _renew(self) -> None:
        self.engine.drop_all()
        for name, pool in self._pools.items():
            self._register(name, pool)

    def _keys(self, stored: Stored, keys: Sequence[str], extra_info: Any) -> BlockKeys:
        before = getattr(extra_info, "prefix_keys", None) or []
        parent = bytes.fromhex(before[-1]) if before else None
        hashes = [bytes.fromhex(key) for key in keys]
        return stored.names.keys_of_hashes(hashes, len(before), parent)

    def _parts(self, pool: str) -> list[Stored]:
        if pool not in self._stored:
            raise LayoutError(f"pool {pool!r} is not registered, only {', '.join(self._stored)}")
        return self._stored[pool]

    def _count(self, keys: list[str], extra_info: Any) -> int:
        return min(
            self.engine.probe(self._keys(each, keys, extra_info)) for each in self._parts(KV)
        )

    def _held(self, pool: str, keys: list[str], extra_info: Any) -> Bools:
        held = [
            self.engine.contains(self._keys(each, keys, extra_info)) for each in self._parts(pool)
        ]
        found: Bools = np.logical_and.reduce(held)
        return found

    def _exists(self, keys: list[str], transfers: Any, extra_info: Any) -> Any:
        """Find the longest prefix that every pool can restore, as SGLang's contract has it."""
        pages = self._count(keys, extra_info)
        hits = {KV: pages} if pages else {}
        fine = np.ones(pages + 1, dtype=np.bool_)  # by length of the prefix
        for each in transfers:
            if each.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # no verdict: such a pool never gates the others
            needed = 0
            if each.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                needed = max(1, len(each.keys or []))
            held = self._held(str(each.name), keys[:pages], extra_info)
            mine = _restorable(held, needed)
            if mine.any():
                hits[each.name] = int(np.flatnonzero(mine).max())
            fine &= mine
        restorable = np.flatnonzero(fine)
        restorable = restorable[restorable > 0]
        longest = int(restorable.max(initial=0))
        return PoolTransferResult(longest, hits, restorable.tolist())

    def _got(self, pool: str, keys: list[str], indices: Any, extra_info: Any) -> list[bool]:
        def load() -> list[bool]:
            return self._move(pool, keys, indices, extra_info, load=True)

        return self._guard.guarded(load, lambda: [False] * len(keys))

    def _put(self, pool: str, keys: list[str], indices: Any, extra_info: Any) -> list[bool]:
        if pool == KV and not self._config.is_storage_writer:
            return [True] * len(keys)

        def save() -> list[bool]:
            return self._move(pool, keys, indices, extra_info, load=False)

        return self._guard.guarded(save, lambda: [False] * len(keys))

    def _move(
        self, pool: str, keys: list[str], indices: Any, extra_info: Any, *, load: bool
    ) -> list[bool]:
        """Move pages between a pool and all parts' frames; say which went whole."""
        table = _pages(indices, len(keys), self._pools[pool].page_size)
        begin = self._load if load else self._save
        under_way = [
            begin(each.cache, self._keys(each, keys, extra_info), table)
            for each in self._parts(pool)
        ]
        good = [_finish(transfer, len(keys), LOAD_S if load else SAVE_S) for transfer in under_way]
        both: list[bool] = np.logical_and.reduce(good).tolist()
        return both

    def _save(self, cache: PagedCache, keys: BlockKeys, table: NDArray[np.int64]) -> Transfer:
        return self.engine.save(keys, cache, table)

    def _load(self, cache: PagedCache, keys: BlockKeys, table: NDArray[np.int64]) -> Transfer:
        with self.engine.match(keys) as lease:
            return self.engine.load(lease, cache, table[: lease.blocks])

    def _page(self, key: str, page: Any, *, load: bool) -> bool:
        """Move one page between a flat tensor in the pool's layout and frames."""
        table = np.zeros(1, dtype=np.int64)
        begin = self._load if load else self._save
        under_way = []
        parts = parts_of(self._pools[KV], self._place, page)
        for part, each in zip(parts, self._parts(KV), strict=True):
            cache = self.engine.cache(each.names, part.arrays, writable=load)
            under_way.append(begin(cache, self._keys(each, [key], None), table))
        waited = LOAD_S if load else SAVE_S
        return all([_finish(transfer, 1, waited).all() for transfer in under_way])


def _arguments() -> Any:
    try:
        return get_server_args()
    except ValueError:  # none are published in this process
        return None


def _none() -> bool:
    return False


def _finish(transfer: Transfer, count: int, timeout_s: float) -> Bools:
    """Wait for a transfer; say for each of `count` pages whether it went whole.

    SGLang uses the pages again when this returns, so what is late is cut short and waited for.
    """
    if not transfer.wait(timeout_s):
        transfer.cancel()
    good = np.zeros(count, dtype=np.bool_)
    good[: len(transfer.good)] = transfer.good
    return good


def _pages(indices: Any, count: int, tokens: int) -> NDArray[np.int64]:
    """Return the numbers of pages whose tokens `indices` names. Raises LayoutError."""
    given = np.asarray(indices if indices is not None else [], dtype=np.int64)
    if len(given) != count * tokens:
        raise LayoutError(f"{len(given)} tokens for {count} pages of {tokens}, expected all")
    table = given.reshape(count, tokens)
    if (table[:, 0] % tokens).any() or (np.diff(table) != 1).any():
        raise LayoutError("tokens of a page that do not lie together in the host pool")
    pages: NDArray[np.int64] = table[:, 0] // tokens
    return pages


def _restorable(held: Bools, trailing: int) -> Bools:
    """Say for each length of a prefix, 0 included, whether a pool has what it needs there.

    trailing: how many of its last pages; 0 for all of them.
    """
    run = np.zeros(len(held) + 1, dtype=np.int64)  # of held pages that end here
    for page, here in enumerate(held.tolist()):
        run[page + 1] = run[page] + 1 if here else 0
    length = np.arange(len(held) + 1)
    needed = length if not trailing else np.minimum(length, trailing)
    fine: Bools = run >= needed
    return fine
