"""Torch tensors out of views, and torch's paged caches in the forms that load and save take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.dlpack import from_dlpack

from kvengine.adapters.array import View, export
from kvengine.errors import LayoutError


def tensor(view: View) -> torch.Tensor:
    """Show the memory of a view as a tensor of the same shape and dtype, without a copy.

    The memory lives as long as the tensor. Work on a device is not waited for.
    Raises LayoutError for a read-only view (torch has no read-only tensors) and for negative
    strides.
    """
    if view.readonly:
        raise LayoutError(
            "a read-only view was given, expected a writable one, since nothing keeps a tensor "
            "from being written: copy it first, or use numpy.from_dlpack(export(view))"
        )
    if any(step < 0 and size > 1 for step, size in zip(view.strides, view.shape, strict=True)):
        raise LayoutError(
            f"a view with strides of {list(view.strides)} bytes was given, expected none below 0, "
            "which torch does not know: flip the array back first"
        )
    return from_dlpack(export(view))


def pairs(caches: Sequence[torch.Tensor], axis: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split each layer's cache into (K, V) on the axis of size 2 that holds them, without a copy.

    `axis` is 0 for [2, blocks, ...], 1 for [blocks, 2, ...]. Raises LayoutError.
    """
    split = []
    for layer, cache in enumerate(caches):
        if not -cache.ndim <= axis < cache.ndim or cache.shape[axis] != 2:
            raise LayoutError(
                f"the cache of layer {layer} has shape {list(cache.shape)}, expected 2 (K and V) "
                f"on axis {axis}: name the axis that holds K and V"
            )
        split.append((cache.select(axis, 0), cache.select(axis, 1)))
    return split


def pages(caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Show each layer's cache [blocks, ...] as the bytes of its blocks, uint8[blocks, page_bytes].

    Without a copy; for Layout.opaque, where the inside of a block is the serving engine's affair.
    Raises LayoutError where the bytes of a block do not lie together.
    """
    shown = []
    for layer, cache in enumerate(caches):
        if cache.ndim < 2 or not cache[:1].is_contiguous():
            raise LayoutError(
                f"the cache of layer {layer} has shape {list(cache.shape)} and strides of "
                f"{list(cache.stride())} elements, expected [blocks, ...] with each block's bytes "
                "together: pass the cache with its axes in the order of memory"
            )
        shown.append(cache.flatten(1).view(torch.uint8))
    return shown


def current_stream(tensor: torch.Tensor) -> int | None:
    """Give torch's current stream on the tensor's device as `view` takes it; None on a CPU."""
    if tensor.device.type != "cuda":
        return None
    handle: int = torch.cuda.current_stream(tensor.device).cuda_stream
    # DLPack calls CUDA's default stream 1, since 0 could be two of them; ROCm has only one.
    return handle if handle or torch.version.hip else 1
