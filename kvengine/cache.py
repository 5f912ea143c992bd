"""The caller's own K/V arrays, checked once and described as addresses and strides.

A paged cache and a contiguous sequence are the same thing here: block `b` of a component begins at
`base + b * block_stride`, and inside it tokens and heads have their strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvengine.adapters.array import View, view
from kvengine.errors import LayoutError
from kvengine.kernels.copy import Moves, Span
from kvengine.kernels.rows import Rows
from kvengine.layout import ITEM_BYTES, Layout, Part, Place

Int64s = NDArray[np.int64]
MAPPING_MAX = 1 << 26


@dataclass(frozen=True, slots=True)
class Strides:
    """Byte strides of one component; components with equal ones share their offsets."""

    block: int
    token: int
    head: int
    dim: int


class PagedCache:
    """Arrays of one cache, one item a layer: (K, V), one [2, ...] array, or one array.

    paged NHD [blocks, block_tokens, heads, dim], paged HND [blocks, heads, block_tokens, dim],
    else NHD [tokens, heads, dim], HND [heads, tokens, dim]; opaque: [blocks, page_bytes] of a
    1-byte dtype. Arrays stay the caller's; they are kept alive by this object. Raises LayoutError
    naming the layer, what was given and what was expected.

    `heads`: of what `part` returns, where the arrays have these of a part's heads alone, the last
    excluded (None: all): parts are verified whole, and these heads of them loaded.
    """

    def __init__(
        self,
        layout: Layout,
        arrays: Sequence[object],
        writable: bool = True,
        heads: Span | None = None,
    ) -> None:
        if len(arrays) != layout.layers:
            raise LayoutError(
                f"caches of {len(arrays)} layers, the namespace's layout has {layout.layers}: give "
                "one item a layer, in order"
            )
        self.layout = layout
        self.writable = writable
        self.heads = heads or (0, layout.kv_heads)
        self.whole = self.heads == (0, layout.kv_heads)
        assert 0 <= self.heads[0] < self.heads[1] <= layout.kv_heads
        self._views: list[View] = []
        self._strides: list[Strides] = []
        self.blocks = self.tokens = -1
        self.page_tokens = 0
        groups: list[int] = []
        for layer, item in enumerate(arrays):
            for part, each in enumerate(self._components(layer, item)):
                groups.append(self._add(layer, part, each))
        self._groups = groups
        self.segments = self._segment_table()
        self._by_block = self._table(by_token=False) if self.page_tokens else None
        self._by_token: Int64s | None = None
        self._parts: dict[Place, PagedCache] = {}

    def part(self, place: Place, layout: Layout) -> PagedCache:
        """Return what these arrays have of one part of each block.

        layout: that of the part, with the layers that are in `place`.
        """
        layout = replace(layout, paged=self.layout.paged)
        if layout == self.layout and place.heads == (0, layout.kv_heads):
            return self
        found = self._parts.get(place)
        if found is None:
            arrays = self._narrowed(place.part)
            made = PagedCache(layout, arrays, self.writable, place.heads)
            found = self._parts[place] = made
        return found

    def _narrowed(self, part: Part) -> list[list[View]]:
        count = len(self.layout.head_dims)
        axis = -2 if self.layout.order == "NHD" else -3
        return [
            [
                each if self.layout.is_opaque else each.narrow(axis, part.head, part.head_end)
                for each in self._views[layer * count : (layer + 1) * count]
            ]
            for layer in range(part.layer, part.layer_end)
        ]

    def moves(
        self,
        frames: Int64s,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
    ) -> Moves:
        """Describe all bytes of a table. frames: address of each block's payload.

        Block table and slot mapping are those that `checked` returned.
        """
        offsets = self._offsets(len(frames), block_table, slot_mapping)
        if slot_mapping is not None:
            if self._by_token is None:
                self._by_token = self._table(by_token=True)
            return Moves(self._by_token, offsets, self.segments, frames, self.whole)
        assert self._by_block is not None
        return Moves(self._by_block, offsets, self.segments, frames, self.whole)

    def rows(
        self,
        frames: Int64s,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
        places: Int64s,
        segments: Int64s,
    ) -> Rows:
        """Describe all elements of a table, head by head and token by token, for a codec.

        places: where each encoded component begins in the payload; segments: as Rows has them.
        Otherwise as `moves`. The layout is not opaque, and its dtype one that codecs know.
        """
        layout = self.layout
        parts = len(layout.head_dims)
        components = []
        for number, given in enumerate(self._views):
            strides = self._strides[self._groups[number]]
            dim = layout.head_dims[number % parts]
            token = 0 if slot_mapping is not None else strides.token
            keys = int(number % parts == 0)
            shape = (token, strides.head, layout.kv_heads, dim, keys, int(places[number]))
            components.append((given.address, self._groups[number], *shape))
        return Rows(
            np.array(components, dtype=np.int64),
            self._offsets(len(frames), block_table, slot_mapping),
            segments,
            frames,
            layout.block_tokens,
            layout.dtype,
            self.heads,
        )

    def _offsets(
        self,
        count: int,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
    ) -> Int64s:
        """Give the offset of each unit of each block, [groups, blocks, units]."""
        if slot_mapping is not None:
            page, within = np.divmod(slot_mapping.reshape(count, -1), self.page_tokens)
            return _stack([page * s.block + within * s.token for s in self._strides])
        assert block_table is not None
        return _stack([block_table.reshape(-1, 1) * s.block for s in self._strides])

    def checked(
        self, count_max: int, block_table: object, slot_mapping: object, *, unique: bool
    ) -> tuple[Int64s | None, Int64s | None, int]:
        """Return block table and slot mapping as int64, and how many blocks they name.

        Raises LayoutError for both or neither, ids out of range, too many or repeated ones.
        """
        if (block_table is None) == (slot_mapping is None):
            raise LayoutError("give either block_table or slot_mapping, one of the two")
        tokens = self.layout.block_tokens
        if block_table is not None:
            table = _integers("block_table", block_table)
            if self.page_tokens != tokens:
                raise LayoutError(
                    f"pages of {self.page_tokens} tokens and blocks of {tokens}: use slot_mapping, "
                    "or a layout whose block_tokens is the page's"
                )
            _within("block_table", table, self.blocks, unique)
            count = len(table)
        else:
            if self.layout.is_opaque:
                raise LayoutError("opaque pages have no token slots: use block_table")
            table = _integers("slot_mapping", slot_mapping)
            if len(table) % tokens:
                raise LayoutError(
                    f"slot_mapping of {len(table)} tokens is no multiple of {tokens}, the tokens "
                    "of a block: leave out the last, partial block"
                )
            _within("slot_mapping", table, self.tokens, unique)
            count = len(table) // tokens
        if count > count_max:
            raise LayoutError(f"a table for {count} blocks, at most {count_max} were named")
        return (table, None, count) if block_table is not None else (None, table, count)

    def _components(self, layer: int, item: object) -> list[View]:
        parts = len(self.layout.head_dims)
        if isinstance(item, tuple | list):
            found = [view(each, writable=self.writable) for each in item]
        else:
            whole = view(item, writable=self.writable)
            if parts == 1:
                found = [whole]
            elif len(whole.shape) and whole.shape[0] == 2:
                found = [whole.select(0, 0), whole.select(0, 1)]
            else:
                raise LayoutError(
                    f"layer {layer}: one array of shape {whole.shape}, expected (K, V) or one "
                    "array with a leading axis of 2"
                )
        if len(found) != parts:
            raise LayoutError(f"layer {layer}: {len(found)} arrays, expected {parts}")
        return found

    def _add(self, layer: int, part: int, given: View) -> int:
        """Check one component and keep it; return the group of its strides."""
        layout = self.layout
        name = f"layer {layer}, component {part}"
        if given.device[0] not in ("cpu", "cuda_host"):
            raise LayoutError(
                f"{name} lies on {given.device[0]}:{given.device[1]}, this engine copies host "
                "memory: move the cache to the CPU"
            )
        if layout.is_opaque:
            if given.itemsize != 1:
                raise LayoutError(
                    f"{name} is {given.dtype}, expected a 1-byte dtype (opaque pages)"
                )
        elif given.dtype != layout.dtype:
            raise LayoutError(
                f"{name} is {given.dtype}, the namespace's layout says {layout.dtype}: cast it, or "
                "open another namespace"
            )
        item = 1 if layout.is_opaque else ITEM_BYTES[layout.dtype]
        if given.address % item:
            raise LayoutError(
                f"{name} begins at an address that is no multiple of {item} bytes: copy it to an "
                "aligned array"
            )
        dim = layout.head_dims[part]
        shape, stride = given.shape, given.strides
        blocks = tokens = page_tokens = 0
        if layout.is_opaque:
            expected = ("blocks", dim)
            fits = len(shape) == 2 and shape[1] == dim
            if fits:
                blocks, page_tokens = shape[0], layout.block_tokens
                strides = Strides(stride[0], 0, 0, stride[1])
        else:
            nhd, heads = layout.order == "NHD", self.heads[1] - self.heads[0]
            names = ("tokens", heads) if nhd else (heads, "tokens")
            expected = ("blocks", *names, dim) if layout.paged else (*names, dim)
            fits = len(shape) == len(expected) and all(
                isinstance(want, str) or want == have
                for want, have in zip(expected, shape, strict=True)
            )
            if fits:
                token_axis = len(shape) - (3 if layout.order == "NHD" else 2)
                head_axis = len(shape) - (2 if layout.order == "NHD" else 3)
                token, head = stride[token_axis], stride[head_axis]
                if layout.paged:
                    blocks, page_tokens = shape[0], shape[token_axis]
                    strides = Strides(stride[0], token, head, stride[-1])
                else:
                    page_tokens = layout.block_tokens
                    blocks = shape[token_axis] // page_tokens
                    tokens = shape[token_axis]
                    strides = Strides(token * page_tokens, token, head, stride[-1])
        if not fits:
            raise LayoutError(f"{name} has shape {shape}, expected {_shown(expected)}")
        self._check_strides(name, given, strides, item)
        tokens = tokens or blocks * page_tokens
        if self.page_tokens and (blocks, page_tokens, tokens) != (
            self.blocks,
            self.page_tokens,
            self.tokens,
        ):
            raise LayoutError(
                f"{name} has shape {shape}, other layers have another number of blocks"
            )
        self.blocks, self.page_tokens, self.tokens = blocks, page_tokens, tokens
        self._views.append(given)
        if strides not in self._strides:
            self._strides.append(strides)
        return self._strides.index(strides)

    def _check_strides(self, name: str, given: View, strides: Strides, item: int) -> None:
        if strides.dim != item and given.shape[-1] > 1:
            raise LayoutError(
                f"{name} has stride {strides.dim} bytes on its last axis, expected {item}: its "
                "heads must lie compact; use .contiguous()"
            )
        for axis, (size, stride) in enumerate(zip(given.shape, given.strides, strict=True)):
            if size > 1 and (stride < 0 or (stride == 0 and self.writable)):
                raise LayoutError(
                    f"{name} has stride {stride} on axis {axis}: expanded or reversed arrays "
                    "cannot be filled; use .contiguous()"
                )
            if stride % item:
                raise LayoutError(
                    f"{name} has stride {stride} on axis {axis}, no multiple of {item}"
                )

    def _segment_table(self) -> Int64s:
        parts = len(self.layout.head_dims)
        nbytes = self.layout.segment_bytes
        rows = [
            (layer * parts, parts, layer * nbytes, nbytes) for layer in range(self.layout.layers)
        ]
        return np.array(rows, dtype=np.int64)

    def _table(self, *, by_token: bool) -> Int64s:
        layout = self.layout
        parts = len(layout.head_dims)
        rows = []
        for number, given in enumerate(self._views):
            layer, part = divmod(number, parts)
            strides = self._strides[self._groups[number]]
            start = layer * layout.segment_bytes + sum(layout.component_bytes[:part])
            if layout.is_opaque:
                pattern: tuple[int, ...] = (1, 0, 0, 1, 0, 0, layout.head_dim, 0)
            else:
                run = layout.head_dims[part] * layout.item_bytes
                pattern = self._pattern(strides, run, by_token)
                tokens = 1 if layout.order == "NHD" else layout.block_tokens
                start += self.heads[0] * tokens * run
            rows.append((given.address, self._groups[number], *pattern, start))
        return np.array(rows, dtype=np.int64)

    def _pattern(self, strides: Strides, run: int, by_token: bool) -> tuple[int, ...]:
        """Return (outer, its strides, inner, its strides, run, unit stride in the frame)."""
        tokens, heads = self.layout.block_tokens, self.heads[1] - self.heads[0]
        if self.layout.order == "NHD":
            unit = self.layout.kv_heads * run
            axes = [(tokens, strides.token, unit), (heads, strides.head, run)]
        else:
            axes = [(heads, strides.head, tokens * run), (tokens, strides.token, run)]
            unit = run
        if by_token:
            axes.pop(0 if self.layout.order == "NHD" else 1)
        while axes and (axes[-1][0] == 1 or axes[-1][1] == axes[-1][2] == run):
            run *= axes.pop()[0]
        while len(axes) < 2:
            axes.insert(0, (1, 0, 0))
        return (*axes[0], *axes[1], run, unit if by_token else 0)


def cache_of(
    layout: Layout, caches: PagedCache | Sequence[object], *, writable: bool
) -> PagedCache:
    """Check a caller's arrays; a PagedCache must be of this layout. Raises LayoutError."""
    if not isinstance(caches, PagedCache):
        return PagedCache(layout, caches, writable)
    if caches.layout != layout and caches.layout.digest() != layout.digest():
        raise LayoutError("this PagedCache was made for a namespace of another layout")
    if writable and not caches.writable:
        raise LayoutError("this PagedCache was made for saving only: make it with engine.cache")
    if not writable and not caches.whole:
        raise LayoutError(
            f"this PagedCache has heads {caches.heads} of {layout.kv_heads}: blocks are saved "
            "whole, from a cache of all heads"
        )
    return caches


def _stack(offsets: list[Int64s]) -> Int64s:
    if len(offsets) == 1:
        return offsets[0][None]
    return np.ascontiguousarray(np.stack(offsets), dtype=np.int64)


def _integers(name: str, given: object) -> Int64s:
    try:
        if hasattr(given, "__dlpack__") and not isinstance(given, np.ndarray):
            given = np.from_dlpack(given)
        array = np.asarray(given)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise LayoutError(
            f"{name} is a {type(given).__name__} that cannot be read ({error}): give integers in "
            "host memory"
        ) from error
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.size > MAPPING_MAX:
        raise LayoutError(f"{name} holds integers, got {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array.reshape(-1), dtype=np.int64)


def _within(name: str, table: Int64s, limit: int, unique: bool) -> None:
    if not len(table):
        return
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= limit:
        raise LayoutError(f"{name} names {low}..{high}, the cache has 0..{limit - 1}")
    if unique and len(set(table.tolist())) != len(table):
        raise LayoutError(f"{name} names a place twice: two blocks cannot be loaded into one")


def _shown(expected: Sequence[object]) -> str:
    return "(" + ", ".join(str(each) for each in expected) + ")"
