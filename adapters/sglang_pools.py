"""SGLang's host pools as arrays of pages, without a copy, cut into parts that name what they hold.

A page of attention K/V has the same frames whatever the pool's memory layout: pages that one host
has saved from a `layer_first` pool fill another's `page_first` one. A part is a range of layers and
of heads, numbered over the whole model, so that what is stored under tensor parallelism of one
degree is found under another, where both cut along the same grid. Tried with SGLang 0.5.23, whose
objects have no types here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvengine.errors import ConfigError, ModelNotSupported
from kvengine.layout import ITEM_BYTES, Layout

# The axes of a pool's memory: components (K and V), layers, pages, tokens, heads, dim, groups of
# heads. Pages and tokens that stand together are one axis in memory.
MHA_AXES = {
    "layer_first": "clpthd",
    "page_first": "cptlhd",
    "page_first_direct": "cplthd",
    "page_head": "cphtld",
    "page_unified": "pglcthd",
}
ASYMMETRIC_AXES = {"page_first": "ptlhd", "page_first_direct": "plthd"}
MLA_AXES = {
    "layer_first": "lpthd",
    "page_first": "ptlhd",
    "page_first_direct": "plthd",
    "page_unified": "pltd",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A range of layers and heads of every page. `name` says which, over the whole model.

    arrays: an item a layer, (K, V) or one array [pages, tokens, heads, dim]; opaque ones
    [pages, bytes].
    """

    name: str
    layout: Layout
    arrays: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands in a model that several share, and the grid that all cut along.

    heads, layers: of a part; 0 for all that a process has.
    """

    rank: int
    size: int
    stage: str
    heads: int = 0
    layers: int = 0


def place_of(config: Any) -> Place:
    """Read a HiCacheStorageConfig. Raises ConfigError for a grid that is no number."""
    extra = config.extra_config or {}
    for name in ("head_group", "layer_partition"):
        value = extra.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{name} is {value!r}, expected a whole number of heads or layers")
    stage = f"pp{config.pp_rank}/{config.pp_size} cp{config.attn_cp_rank}/{config.attn_cp_size}"
    if config.dcp_size > 1:
        stage += f" dcp{config.dcp_rank}/{config.dcp_size}"
    grid = (extra.get("head_group", 0), extra.get("layer_partition", 0))
    return Place(config.tp_rank, config.tp_size, stage, *grid)


def parts_of(pool: Any, place: Place, page: Any = None) -> list[Part]:
    """Cut a host pool into parts; `page`: a flat tensor of one page in its layout, in its stead.

    Raises ModelNotSupported for a pool whose memory cannot be named, ConfigError for a grid that
    does not fit it.
    """
    kind = type(pool).__name__  # a class made from one of these may keep more beside its buffer
    if kind == "MLATokenToKVPoolHost":
        return list(_cut(pool, _latent(pool, page), place, replicated=True))
    if kind == "MHATokenToKVPoolHost" or kind == "AsymmetricMHATokenToKVPoolHost":
        return list(_cut(pool, _keys_and_values(pool, page), place, replicated=False))
    if page is not None:
        raise ModelNotSupported(
            f"pages of a {kind} cannot be moved through tensors: set 'interface_v1' to 1"
        )
    return list(_opaque(pool, place))


def _keys_and_values(pool: Any, page: Any) -> tuple[Any, ...]:
    """Return K and V, [layers, pages, tokens, groups, heads, dim] each."""
    buffer = pool.kv_buffer
    if isinstance(buffer, tuple):
        axes = _axes(pool, ASYMMETRIC_AXES)
        return tuple(_ordered(each, axes, pool, "lptghd") for each in buffer)
    axes = _axes(pool, MHA_AXES)
    if page is not None:
        buffer = page.view(_page_shape(pool, axes, pool.head_dim))
    return tuple(_ordered(buffer, axes, pool, "clptghd"))


def _latent(pool: Any, page: Any) -> tuple[Any, ...]:
    """Return what stands for K and V, [layers, pages, tokens, 1, 1, dim], alone."""
    axes = _axes(pool, MLA_AXES)
    buffer = pool.kv_buffer
    if page is not None:
        buffer = page.view(_page_shape(pool, axes, pool.kv_cache_dim))
    if "h" not in axes:
        buffer, axes = buffer.unsqueeze(-2), axes.replace("d", "hd")
    return (_ordered(buffer, axes, pool, "lptghd"),)


def _axes(pool: Any, known: dict[str, str]) -> str:
    if pool.layout not in known:
        raise ModelNotSupported(
            f"{type(pool).__name__} has the memory layout {pool.layout!r}, expected one of "
            f"{', '.join(known)}: set --hicache-mem-layout"
        )
    return known[pool.layout]


def _ordered(buffer: Any, axes: str, pool: Any, wanted: str) -> Any:
    """Show a pool's memory with its axes in the order of `wanted`."""
    if buffer.ndim < len(axes):
        buffer = buffer.unflatten(axes.index("p"), (-1, pool.page_size))
    if "g" not in axes:
        buffer, axes = buffer.unsqueeze(0), "g" + axes
    return buffer.permute([axes.index(axis) for axis in wanted])


def _page_shape(pool: Any, axes: str, dim: int) -> list[int]:
    groups = pool.head_group_num if "g" in axes else 1
    heads = getattr(pool, "head_num", 1) // groups
    sizes = {"c": 2, "l": pool.layer_num, "p": 1, "t": pool.page_size, "g": groups}
    return [{**sizes, "h": heads, "d": dim}[axis] for axis in axes]


def _cut(pool: Any, components: tuple[Any, ...], place: Place, replicated: bool) -> Iterator[Part]:
    layers, _, tokens, groups, heads, _ = components[0].shape
    step = layers if not place.layers else place.layers
    width = heads if replicated or not place.heads else place.heads
    first_layer = int(pool.start_layer or 0)
    first_head = 0 if replicated else place.rank * groups * heads
    if heads % width or first_layer % step and place.layers:
        raise ConfigError(
            f"head_group {place.heads} and layer_partition {place.layers} do not fit a pool with "
            f"{heads} heads from layer {first_layer} on: choose divisors of every process's share"
        )
    total = heads if replicated else groups * heads * place.size
    kinds = [str(each.dtype).removeprefix("torch.") for each in components]
    if len(set(kinds)) != 1 or kinds[0] not in ITEM_BYTES:
        raise ModelNotSupported(
            f"{type(pool).__name__} holds {', '.join(kinds)}, expected one of "
            f"{', '.join(ITEM_BYTES)}"
        )
    dims = [each.shape[-1] for each in components]
    layout_of = {"dtype": kinds[0], "block_tokens": tokens, "order": "NHD"}
    for a in range(0, layers, step):
        b = min(a + step, layers)
        layout = Layout(b - a, width, dims[0], dims[1] if len(dims) > 1 else 0, **layout_of)
        for group in range(groups):
            for head in range(0, heads, width):
                start = first_head + group * heads + head
                chosen = [each[a:b, :, :, group, head : head + width] for each in components]
                arrays = zip(*chosen, strict=True) if len(chosen) > 1 else chosen[0]
                name = f"L{first_layer + a}-{first_layer + b} H{start}-{start + width}/{total}"
                yield Part(name, layout, tuple(arrays))


def _opaque(pool: Any, place: Place) -> Iterator[Part]:
    """Show pools whose inside only SGLang knows by the runs of bytes that a page is made of."""
    kind = f"sglang {type(pool).__name__} {pool.layout} {getattr(pool, 'dtype', None)}"
    runs = _runs(pool)
    for nbytes in sorted({run.shape[1] for run in runs}):
        same = tuple(run for run in runs if run.shape[1] == nbytes)
        layout = Layout.opaque(
            layers=len(same), page_bytes=nbytes, block_tokens=pool.page_size, permutation=kind
        )
        yield Part(f"{place.stage} tp{place.rank}/{place.size} {nbytes}", layout, same)


def _runs(pool: Any) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return each run of a page, over all pages, uint8[pages, bytes]; they keep nothing alive."""
    pages = pool.size // pool.page_size
    try:
        addresses, sizes = pool.get_page_buffer_meta(torch.arange(pages * pool.page_size))
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ModelNotSupported(
            f"{type(pool).__name__} gives no addresses of its pages ({error}): set "
            "--hicache-mem-layout to page_first or page_first_direct"
        ) from error
    count = len(addresses) // pages
    table = np.array(addresses, dtype=np.int64).reshape(pages, count)
    steps = np.diff(table, axis=0)
    if pages > 1 and (steps != steps[0]).any() or sizes != sizes[:count] * pages:
        raise ModelNotSupported(
            f"the pages of {type(pool).__name__} do not lie at even steps: set "
            "--hicache-mem-layout to page_first or page_first_direct"
        )
    found = []
    for run in range(count):
        step = int(steps[0, run]) if pages > 1 else sizes[run]
        memory = {
            "version": 3,
            "data": (int(table[0, run]), False),
            "shape": (pages, sizes[run]),
            "strides": (step, 1),
            "typestr": "|u1",
        }
        found.append(np.asarray(type("Memory", (), {"__array_interface__": memory})()))
    return found
