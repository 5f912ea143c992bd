"""Continuous batching of transformers: its paged cache, filled from and saved to an engine.

    manager = model.init_continuous_batching(generation_config, batching_config)
    attach(PrefixCache(engine, model), manager)
    manager.start()

transformers has no hook for this: two methods of the paged cache that a manager makes are wrapped,
on that object alone. Where a prompt is looked for among the cached blocks, those that the engine
has are loaded into free ones first; where blocks are noted as complete, they are saved. Both wait
for the bytes, since a block may be given to another request by the next step. Tried with
transformers 5.19; another version whose parts are not found is refused.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import transformers
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    compute_block_hash,
)

from kvengine.adapters.transformers import LOAD_S, SAVE_S, PrefixCache
from kvengine.cache import PagedCache
from kvengine.errors import ModelNotSupported
from kvengine.keys import BlockKeys
from kvengine.layout import Layout

FULL = "full_attention"
SAVED = "kvengine_keys"  # on a request: of its blocks that are saved
PARTS = {
    "cache": ("cache_allocators", "search_prefix_match", "mark_complete_blocks"),
    "allocator": ("_copy_view", "block_table", "head_dim", "index", "layer_indices", "ledger"),
    "pool": ("allocate_sector", "count_free_blocks", "free_blocks", "get_free_blocks"),
    "ledger": ("block_to_hash", "cached_blocks", "hash_to_block", "register_new_hash"),
}


def attach(cache: PrefixCache, manager: Any) -> None:
    """Have a manager of continuous batching use the engine. Call it before `manager.start`.

    Raises ModelNotSupported for a manager that has begun, or one of another version.
    """
    create = getattr(manager, "_create_batch_processor", None)
    if create is None or getattr(manager, "batch_processor", None) is not None:
        raise ModelNotSupported(
            f"a {type(manager).__name__} was given, expected a manager of continuous batching that "
            "has not begun: attach before manager.start()"
        )

    def created(_: Any) -> Any:
        processor = create()
        wrap(cache, processor.cache)
        return processor

    manager._create_batch_processor = types.MethodType(created, manager)


def wrap(cache: PrefixCache, paged: Any) -> None:
    """Wrap the two methods of a paged cache, once. Raises ModelNotSupported."""
    if getattr(paged, "kvengine_blocks", None) is not None:
        return
    allocators = getattr(paged, "cache_allocators", {})
    if tuple(allocators) != (FULL,):
        raise ModelNotSupported(
            f"the paged cache keeps {', '.join(allocators) or 'nothing known'}, expected full "
            "attention in all layers: serve this model without kvengine"
        )
    allocator = allocators[FULL]
    found = {"cache": paged, "allocator": allocator, "pool": getattr(allocator, "pool", None)}
    found["ledger"] = getattr(allocator, "ledger", None)
    missing = [f"{n}.{p}" for n, parts in PARTS.items() for p in parts if not hasattr(found[n], p)]
    if missing:
        raise ModelNotSupported(
            f"transformers {transformers.__version__} has no {', '.join(missing)}, expected a "
            "version like 5.19: serve without kvengine, or with that"
        )
    if not paged.use_prefix_sharing:
        raise ModelNotSupported(
            "the paged cache shares no blocks: set allow_block_sharing=True in the "
            "ContinuousBatchingConfig"
        )
    blocks = paged.kvengine_blocks = Blocks(cache, allocator)
    search, mark = paged.search_prefix_match, paged.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        blocks.restore(prompt_ids)
        length: int = search(request_id, prompt_ids)
        return length

    def mark_complete_blocks(state: Any, complete_blocks: Any) -> None:
        mark(state, complete_blocks)
        if complete_blocks:
            blocks.save(state)

    paged.search_prefix_match = search_prefix_match
    paged.mark_complete_blocks = mark_complete_blocks


class Blocks:
    """The blocks of a paged cache, by the engine's names. Called from the manager's thread."""

    def __init__(self, cache: PrefixCache, allocator: Any) -> None:
        self._engine = cache.engine
        self._guarded = cache.guard.guarded
        self._allocator = allocator
        self._tokens = tokens = allocator.tokens_per_page
        heads, dim = allocator.num_key_value_heads, allocator.head_dim
        dtype = str(allocator.cache_dtype).removeprefix("torch.")
        count = len(allocator.layer_indices)
        layout = Layout(count, heads, dim, dim, dtype, tokens, "NHD")
        whole = allocator._copy_view.view(allocator.cache_dtype)
        whole = whole.view(len(whole), count, 2, tokens, heads, dim)
        arrays = [(whole[:, layer, 0], whole[:, layer, 1]) for layer in range(count)]
        self._names = cache.names(layout, "paged")
        self._pages: PagedCache = self._engine.cache(self._names, arrays)

    def restore(self, prompt: list[int]) -> None:
        """Load what follows the cached blocks of a prompt into free blocks, as cached ones."""
        self._guarded(lambda: self._restore(prompt), lambda: None)

    def save(self, state: Any) -> None:
        """Save the complete blocks of a request that were not saved before."""
        self._guarded(lambda: self._save(state), lambda: None)

    def _restore(self, prompt: list[int]) -> None:
        allocator, ledger, tokens = self._allocator, self._allocator.ledger, self._tokens
        count = (len(prompt) - 1) // tokens
        hashes: list[int] = []
        for start in range(0, count * tokens, tokens):
            parent = hashes[-1] if hashes else None
            hashes.append(compute_block_hash(parent, prompt[start : start + tokens]))
        known = [block in ledger.hash_to_block for block in hashes]
        first = known.index(False) if False in known else count
        if first == count:
            return
        with self._engine.match(self._names.keys(prompt[: count * tokens])) as lease:
            wanted = len(lease.worth) - first
            free = self._free(wanted) if wanted > 0 else []
            if not free:
                return
            good = 0
            try:
                transfer = self._engine.load(lease, self._pages, np.array(free), first=first)
                if not transfer.wait(LOAD_S):
                    transfer.cancel()  # nobody else may have the blocks before
                good = transfer.blocks
            finally:
                allocator.pool.free_blocks(allocator.index, free[good:])
        for block, value in zip(free[:good], hashes[first:], strict=False):
            if ledger.register_new_hash(block, value) is None:
                ledger.cached_blocks[block] = None
            else:
                allocator.pool.free_blocks(allocator.index, [block])

    def _free(self, wanted: int) -> list[int]:
        """Take up to so many free blocks; none that are cached or in use give way."""
        pool, index = self._allocator.pool, self._allocator.index
        while pool.count_free_blocks(index) < wanted and pool.num_free_sectors > 0:
            pool.allocate_sector(index)
        taken: list[int] = pool.get_free_blocks(index, min(wanted, pool.count_free_blocks(index)))
        return taken

    def _save(self, state: Any) -> None:
        table = self._allocator.block_table.get(state.request_id, [])
        hashed = [block in self._allocator.ledger.block_to_hash for block in table]
        count = hashed.index(False) if False in hashed else len(table)
        before: BlockKeys | None = getattr(state, SAVED, None)
        first = 0 if before is None else before.position + len(before)
        if count <= first:
            return
        ids = (state.initial_tokens + state.generated_tokens)[first * self._tokens :]
        ids = ids[: (count - first) * self._tokens]
        keys = self._names.keys(ids) if before is None else before.following(ids)
        setattr(state, SAVED, keys)
        transfer = self._engine.save(keys, self._pages, np.array(table[first:count]))
        if not transfer.wait(SAVE_S):
            transfer.cancel()  # nobody may write the blocks before
