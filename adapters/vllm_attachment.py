"""One engine under a vLLM: its groups of layers, the names of their blocks, and what goes wrong.

vLLM makes one half of a connector for its scheduler and one for its worker; they share an
Attachment. Every method of a half that vLLM calls stands behind a `border`, where an error of ours
becomes a count and what the method says when it knows nothing.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import kvengine
from kvengine.adapters.vllm_identity import Facts
from kvengine.errors import ModelNotSupported
from kvengine.tiers.breaker import Breaker

# vLLM 0.32 looks through all loaded modules when it starts on a CPU, and fails on numba's: the
# engine is loaded when it is opened, after that.
if TYPE_CHECKING:
    from kvengine.cache import PagedCache
    from kvengine.keys import BlockKeys, Namespace

ERRORS = "vllm:kvengine_errors"
UNFILLED = "vllm:kvengine_unfilled_blocks"
ERRORS_MAX = 32  # with no good transfer between them: then the engine is left alone for a while
PAUSE_S, PAUSE_S_MAX = 1.0, 60.0
NAMESPACES_MAX = 1024
FLUSH_S = 10.0
GROUP_BYTES = 4  # vLLM's names of blocks end with the number of their group

logger = logging.getLogger(__name__)
Method = TypeVar("Method", bound=Callable[..., Any])


def border(otherwise: Callable[..., Any]) -> Callable[[Method], Method]:
    """Turn an error of a half's method into a count, and into what `otherwise` returns.

    `otherwise` is called with what the method was called with. It must not fail.
    """

    def wrap(method: Method) -> Method:
        @functools.wraps(method)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                with suppress(Exception):
                    self.attachment.failed(method.__qualname__)
                return otherwise(self, *args, **kwargs)

        return guarded  # type: ignore[return-value]  # it has the method's own signature

    return wrap


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that vLLM pages together. `layers`: the index of each in a frame, by vLLM's name."""

    number: int
    block_tokens: int
    hash_step: int  # vLLM's hashes a block
    windowed: bool  # attention reads the last tokens only, and no more than those are loaded
    layers: Mapping[str, int]
    layout: kvengine.Layout = field(repr=False)
    caches: Sequence[Any] = field(repr=False)

    def hashes(self, request: Any) -> list[bytes]:
        """Return vLLM's names of a request's full blocks in this group, as vLLM forms them."""
        suffix = self.number.to_bytes(GROUP_BYTES, "big")
        found = request.block_hashes[self.hash_step - 1 :: self.hash_step]
        return [bytes(each) + suffix for each in found]

    def hash_before(self, request: Any, first: int) -> bytes | None:
        """Return vLLM's name of the block before a request's block `first`, where it has one."""
        if not first:
            return None
        found = request.block_hashes[first * self.hash_step - 1]
        return bytes(found) + self.number.to_bytes(GROUP_BYTES, "big")


class Attachment:
    """One engine and one paged cache, shared by a manager and a worker."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.engine = kvengine.open(url, **options)
        self.counts = {ERRORS: 0, UNFILLED: 0}  # since vLLM last asked
        self.users = 0
        self.groups: dict[int, Group] = {}
        self._breaker = Breaker(ERRORS_MAX, PAUSE_S, PAUSE_S_MAX)
        self._errors = 0
        self._facts: Facts | None = None
        self._salt = ""
        self._namespaces: dict[tuple[int, str], Namespace] = {}
        self._caches: dict[int, PagedCache] = {}

    @property
    def serves(self) -> bool:
        """Whether new work may be asked of the engine."""
        return bool(self._caches) and (
            self._breaker.closed or self._breaker.trial(time.monotonic())
        )

    def register(self, config: Any, kv_caches: Any, facts: Facts, pages: str) -> None:
        """Take the paged cache that vLLM gives its offloading workers. `pages` names its order.

        Raises ModelNotSupported where layers of a group differ, LayoutError where an array does not
        fit.
        """
        groups = {}
        for index, group in enumerate(config.groups):
            refs = kv_caches.group_data_refs[index]
            arrays = [kv_caches.tensors[ref.tensor_idx].tensor for ref in refs]
            sizes = sorted({array.shape[1] for array in arrays})
            if len(sizes) != 1:
                raise ModelNotSupported(
                    f"the layers have pages of {sizes} bytes, expected one size: not supported "
                    "yet, serve this model without kvengine"
                )
            # A packed page holds all layers of its group.
            whole = len(refs) != len(group.layer_names)
            order = f"{facts.permutation} {pages} group {group.group_id}"
            groups[group.group_id] = Group(
                number=group.group_id,
                block_tokens=group.tokens_per_block,
                hash_step=group.tokens_per_block // config.cache.tokens_per_hash,
                windowed=group.group_id in facts.windowed,
                layers={name: 0 if whole else at for at, name in enumerate(group.layer_names)},
                layout=kvengine.Layout.opaque(
                    layers=len(arrays),
                    page_bytes=sizes[0],
                    block_tokens=group.tokens_per_block,
                    permutation=order,
                ),
                caches=arrays,
            )
        self.take(groups, facts)

    def take(self, groups: dict[int, Group], facts: Facts) -> None:
        """Serve these groups from now on. Raises LayoutError where an array does not fit."""
        self._facts, self.groups = facts, groups
        self._caches = {
            number: self.engine.cache(self.namespace(number, ""), group.caches)
            for number, group in groups.items()
        }

    def cache(self, number: int) -> PagedCache:
        """Return a group's part of the paged cache."""
        return self._caches[number]

    def namespace(self, number: int, adapter: str) -> Namespace:
        """Return where keys of a group come from, under a LoRA adapter's digest or none ("")."""
        found = self._namespaces.get((number, adapter))
        if found is None:
            facts = self._facts
            assert facts is not None
            found = self._namespaces[number, adapter] = self.engine.namespace(
                model=facts.model,
                revision=facts.revision,
                layout=self.groups[number].layout,
                kv_dtype=facts.kv_dtype,
                positional=facts.positional,
                source=facts.source,
                adapter=adapter,
                salt=self._salt,
            )
        return found

    def takes(self, adapter: str) -> bool:
        """Whether a LoRA adapter is known here, or one more may be."""
        first = next(iter(self.groups), 0)
        return (first, adapter) in self._namespaces or len(self._namespaces) < NAMESPACES_MAX

    def rename(self, salt: str) -> None:
        """Name all later blocks anew: with a fresh salt, what is held is never found again."""
        self._salt = salt
        self._namespaces.clear()

    def keys(
        self,
        number: int,
        adapter: str,
        hashes: Sequence[bytes],
        position: int,
        parent: bytes | None,
    ) -> BlockKeys:
        """Name consecutive blocks; the first is the prompt's block `position`, after `parent`."""
        return self.namespace(number, adapter).keys_of_hashes(hashes, position, parent)

    def failed(self, where: str) -> None:
        """Count an error that becomes a miss; the first is logged whole."""
        self._errors += 1
        self.counts[ERRORS] += 1
        self.engine.metrics.add("adapter_errors", adapter="vllm")
        if self._errors == 1:
            logger.exception("kvengine: an error in %s becomes a miss; more are counted", where)
        if self._breaker.failed(time.monotonic()):
            logger.error("kvengine: %d errors, vLLM serves on without it", self._errors)

    def succeeded(self) -> None:
        """Note that a transfer went well: the errors before it are forgotten."""
        self._breaker.succeeded()

    def tried(self) -> None:
        """Note that a look-up went well: an engine that was left alone is asked again."""
        if not self._breaker.closed:
            self._breaker.succeeded()

    def forsake(self) -> None:
        """Serve no more: the names of the blocks are wrong now, and there are no others."""
        self._caches = {}

    def close(self) -> None:
        """Write back what the tiers lack, for at most FLUSH_S, and close the engine."""
        self._caches = {}
        self.engine.flush(FLUSH_S)
        self.engine.close()
