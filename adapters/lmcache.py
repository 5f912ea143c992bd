"""kvengine as remote storage of LMCache, by its plug-in interface.

    remote_storage_plugins: ["kvengine"]
    pre_caching_hash_algorithm: sha256_cbor
    extra_config:
      remote_storage_plugin.kvengine.module_path: kvengine.adapters.lmcache
      remote_storage_plugin.kvengine.class_name: KVEngineAdapter
      remote_storage_plugin.kvengine.url: "mem://?size=4G | file:///var/cache/kv?size=100G"
      remote_storage_plugin.kvengine.revision: NAME-OF-THE-WEIGHTS
      remote_storage_plugin.kvengine.accept_64_bit_names: true

More settings: "options", a table as `kvengine.open` takes it. Bytes are verified whenever they are
loaded, straight into LMCache's own memory. But LMCache names a chunk by 64 bits of a hash that
covers no LoRA adapter: with other chunks than those that it means, they cannot be told apart here,
and the setting says that this is known. Only full chunks are kept. Tried with LMCache 0.5.6, whose
objects have no types here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from blake3 import blake3
from lmcache.v1.storage_backend.connector import ConnectorAdapter
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from numpy.typing import NDArray

import kvengine
from kvengine.adapters.guard import Guard
from kvengine.errors import ConfigError
from kvengine.keys import BlockKeys
from kvengine.layout import Layout

HASHES = ("sha256_cbor", "sha256_cbor_64bit")
SEGMENT_BYTES = 1 << 20  # at least, where a chunk has so many
LOAD_S, SAVE_S = 10.0, 30.0


class KVEngineAdapter(ConnectorAdapter):
    """Makes a connector for the plug-in "kvengine", or "kvengine.NAME"."""

    def __init__(self) -> None:
        super().__init__("plugin://kvengine")

    def create_connector(self, context: Any) -> Any:
        """Raise ConfigError for settings that do not fit, and what `kvengine.open` raises."""
        return KVEngineConnector(
            context.config, context.metadata, context.local_cpu_backend, context.plugin_name
        )


class KVEngineConnector(RemoteConnector):
    """See the module. LMCache calls from its event loop; what waits runs on a thread."""

    def __init__(self, config: Any, metadata: Any, memory: Any, plugin_name: str | None) -> None:
        super().__init__(config, metadata)
        given = config.extra_config or {}

        def setting(name: str, otherwise: Any = None) -> Any:
            return given.get(f"remote_storage_plugin.{plugin_name}.{name}", otherwise)

        if not isinstance(setting("url"), str):
            raise ConfigError(
                f"extra_config has no remote_storage_plugin.{plugin_name}.url: give one, such as "
                "'mem://?size=4G | file:///var/cache/kv?size=100G'"
            )
        if not setting("revision"):
            raise ConfigError(
                f"extra_config has no remote_storage_plugin.{plugin_name}.revision: give a name "
                "that changes with the weights, since LMCache's keys do not"
            )
        if setting("accept_64_bit_names") is not True:
            raise ConfigError(
                "LMCache names chunks by 64 bits of a hash that covers no LoRA adapter, so chunks "
                f"may be taken for others: set remote_storage_plugin.{plugin_name}."
                "accept_64_bit_names to true where that is known and fine"
            )
        if config.pre_caching_hash_algorithm not in HASHES:
            raise ConfigError(
                f"pre_caching_hash_algorithm is {config.pre_caching_hash_algorithm!r}, expected "
                f"one of {', '.join(HASHES)}: others differ between processes, or are predictable"
            )
        self._memory = memory
        self._layout = _layout(self.full_chunk_size_bytes, metadata.chunk_size, self._order())
        self._about = {
            "model": metadata.model_name,
            "revision": setting("revision"),
            "kv_dtype": str(metadata.kv_dtype),
            "positional": "lmcache",
            "source": f"lmcache/{config.pre_caching_hash_algorithm}/64",
        }
        self.engine = kvengine.open(setting("url"), **setting("options", {}))
        self._guard = Guard(self.engine, "lmcache")

    async def exists(self, key: Any) -> bool:
        return await asyncio.to_thread(self.exists_sync, key)

    def exists_sync(self, key: Any) -> bool:
        return self.batched_contains([key]) == 1

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        """Count the leading chunks that are held."""
        return self._guard.guarded(lambda: self._count(keys), lambda: 0)

    async def get(self, key: Any) -> Any:
        """Return a memory object of LMCache's with a verified chunk; None for a miss."""
        return await asyncio.to_thread(self._guard.guarded, lambda: self._get(key), lambda: None)

    async def put(self, key: Any, memory_obj: Any) -> None:
        """Store a full chunk. Its bytes have been taken when this is over."""
        await asyncio.to_thread(self._guard.guarded, lambda: self._put(key, memory_obj), _nothing)

    def remove_sync(self, key: Any) -> bool:
        return self._guard.guarded(lambda: self.engine.drop(self._keys([key])) > 0, lambda: False)

    async def list(self) -> Sequence[str]:
        """Name nothing: names are kept as keyed hashes, which cannot be read back."""
        return []

    async def close(self) -> None:
        """Write what is committed to the tiers below."""
        await asyncio.to_thread(self.engine.close)

    # Inside

    def _order(self) -> str:
        shapes = [tuple(shape) for shape in self.meta_shapes]
        return f"lmcache {self.meta_fmt} {shapes} {self.meta_dtypes}"

    def _keys(self, keys: Sequence[Any]) -> BlockKeys:
        names = self.engine.namespace(layout=self._layout, **self._about)
        return names.keys_of_hashes([blake3(key.to_string().encode()).digest() for key in keys])

    def _count(self, keys: Sequence[Any]) -> int:
        return self.engine.probe(self._keys(keys))

    def _parts(self, memory_obj: Any) -> Sequence[NDArray[np.uint8]] | None:
        """Show a chunk's bytes as one page a segment, without a copy; None if it is not full."""
        data = np.frombuffer(memory_obj.byte_array, dtype=np.uint8)
        if data.nbytes != self.full_chunk_size_bytes:
            return None
        return list(data.reshape(self._layout.layers, 1, -1))

    def _put(self, key: Any, memory_obj: Any) -> None:
        parts = self._parts(memory_obj)
        if parts is not None:
            transfer = self.engine.save(self._keys([key]), parts, np.zeros(1, dtype=np.int64))
            if not transfer.wait(SAVE_S):
                transfer.cancel()  # LMCache uses the memory again

    def _get(self, key: Any) -> Any:
        with self.engine.match(self._keys([key])) as lease:
            if not lease.blocks:
                return None
            found = self._memory.allocate(self.meta_shapes, self.meta_dtypes, self.meta_fmt)
            if found is None:
                return None
            good = False
            try:
                parts = self._parts(found)
                if parts is not None:
                    transfer = self.engine.load(lease, parts, np.zeros(1, dtype=np.int64))
                    if not transfer.wait(LOAD_S):
                        transfer.cancel()
                    good = bool(transfer.good.all())
            finally:
                if not good:
                    found.ref_count_down()
            return found if good else None


def _layout(nbytes: int, tokens: int, order: str) -> Layout:
    """Cut a chunk into segments of equal size, of SEGMENT_BYTES where that divides it."""
    count = max(1, nbytes // SEGMENT_BYTES)
    while nbytes % count:
        count -= 1
    return Layout.opaque(
        layers=count, page_bytes=nbytes // count, block_tokens=tokens, permutation=order
    )


def _nothing() -> None:
    pass
