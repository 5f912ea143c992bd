"""kvengine's policies for what leaves vLLM's own CPU cache: eviction only, vLLM keeps the bytes.

    "kv_connector_extra_config": {"cpu_bytes_to_use": ..., "eviction_policy": "KVEngineCachePolicy",
        "cache_policy_module_path": "kvengine.adapters.vllm_policy"}

For vLLM's CPUOffloadingSpec and TieringOffloadingSpec. Tried with vLLM 0.32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, order_request_keys

from kvengine.policy import NO_PARENT, Entries, Run
from kvengine.policy.named import policy_of

PLACES_MAX = 1 << 16

logger = logging.getLogger(__name__)


class KVEngineCachePolicy(CachePolicy):
    """The policy that `adaptive` names. A subclass may name another; see kvengine's setting.

    A policy that fails is left out from then on, and the chunks leave in the order of their coming.
    """

    policy: ClassVar[str] = "adaptive"

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.clear()

    def clear(self) -> None:
        self._policy = policy_of(self.policy)
        self._chunks: dict[bytes, Any] = {}
        self._ids: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._free = list(range(self.cache_capacity - 1, -1, -1))
        self._evictable: dict[bytes, None] = {}
        self._places: dict[bytes, tuple[bytes | None, int]] = {}  # of chunks that are to come
        self._works = True

    def _guarded(self, tell: Callable[[], object]) -> None:
        if self._works:
            try:
                tell()
            except Exception:
                self._works = False
                logger.exception("kvengine: the policy has failed, and is left out from now on")

    def get(self, key: bytes) -> Any | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[bytes], req_context: Any) -> None:
        """Take down which chunk each of those to come continues."""
        before: bytes | None = None
        for key in order_request_keys([list(keys)], req_context):
            self._places[key] = (before, req_context.get_offload_key_position(key) or 0)
            before = key
        while len(self._places) > PLACES_MAX:
            del self._places[next(iter(self._places))]

    def insert(self, key: bytes, chunk: Any) -> None:
        number = self._ids[key] = self._free.pop()
        self._chunks[key], self._keys[number] = chunk, key
        above, position = self._places.pop(key, (None, 0))
        parent = NO_PARENT if above is None else self._ids.get(above, NO_PARENT)
        entries = _entries([number])
        run = Run(entries, parent, position, entry_bytes=1)
        self._guarded(lambda: self._policy.added(run, time.monotonic()))
        if chunk.ref_cnt == 0:
            self._evictable[key] = None
        else:
            self._guarded(lambda: self._policy.held(entries))

    def remove(self, key: bytes) -> None:
        entries = self._forget([key])
        self._guarded(lambda: self._policy.removed(entries))

    def touch(self, keys: Iterable[bytes], req_context: Any) -> None:
        known = [self._ids[key] for key in keys if key in self._ids]
        if known:
            run = Run(_entries(known), NO_PARENT, 0, entry_bytes=1)
            self._guarded(lambda: self._policy.touched(run, time.monotonic()))

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[bytes]],
        insertion_only_keys: set[bytes],
        reused_keys: set[bytes],
        req_context: Any,
    ) -> None:
        for keys in key_groups:
            self.touch([key for key in keys if key not in insertion_only_keys], req_context)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        """Take out n chunks, or none."""
        spared = [key for key in protected if key in self._evictable]
        if len(self._evictable) - len(spared) < n:
            return None
        kept = _entries([self._ids[key] for key in spared])
        chosen: list[bytes] = []

        def choose() -> None:
            self._policy.held(kept)
            for victims in self._policy.victims(n, time.monotonic()):
                taken = victims[: n - len(chosen)]
                chosen.extend(self._keys[number] for number in taken.tolist())
                self._policy.removed(taken)
                if len(chosen) == n:
                    break
            self._policy.freed(kept)

        if n:
            self._guarded(choose)
        # What it has left, a child that is held keeps in its place: another goes.
        others = (key for key in self._evictable if key not in protected and key not in chosen)
        more = [key for key, _ in zip(others, range(n - len(chosen)), strict=False)]
        gone = _entries([self._ids[key] for key in more])
        self._guarded(lambda: self._policy.removed(gone))
        found = [(key, self._chunks[key]) for key in chosen + more]
        self._forget(chosen + more)
        return found

    def mark_evictable(self, key: bytes) -> None:
        self._evictable[key] = None
        entries = _entries([self._ids[key]])
        self._guarded(lambda: self._policy.freed(entries))

    def mark_non_evictable(self, key: bytes) -> None:
        self._evictable.pop(key, None)
        entries = _entries([self._ids[key]])
        self._guarded(lambda: self._policy.held(entries))

    def _forget(self, keys: Iterable[bytes]) -> Entries:
        numbers = []
        for key in keys:
            del self._chunks[key]
            self._evictable.pop(key, None)
            numbers.append(self._ids.pop(key))
            del self._keys[numbers[-1]]
        self._free += numbers
        return _entries(numbers)


def _entries(numbers: list[int]) -> Entries:
    return np.array(numbers, dtype=np.int32)
