"""JAX's paged pools: the engine's blocks in, and blocks of the pool out.

    pool = PagedPool(engine, names, caches)
    with engine.match(keys) as lease:
        caches, blocks = pool.load(lease, caches, block_table)
    transfer = pool.save(keys, caches, block_table)

A jax.Array is never written to. The pool stays JAX's own: `load` has the engine fill memory of its
own, shows that to JAX without a copy (DLPack), and scatters it under jit into the pool, which is
donated, so that XLA updates it in place. `save` gathers blocks under jit and hands over what that
gave; the pool itself is never exported, since XLA would copy it at its next donation.

XLA's CPU backend moves floats of 16 and 8 bits as single precision, which would change NaNs: there
a pool of them is taken for unsigned words as a whole, which rewrites all of it, in place; other
pools are touched only where blocks go. Tried with JAX 0.10, on CPUs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import NDArray

from kvengine import Client, Engine
from kvengine.adapters.array import View, export, view
from kvengine.adapters.guard import Guard
from kvengine.cache import PagedCache
from kvengine.errors import LayoutError
from kvengine.keys import BlockKeys, Namespace
from kvengine.layout import Layout
from kvengine.lease import Lease
from kvengine.retention import Retention
from kvengine.transfer import Transfer

STAGED_BYTES = 64 << 20  # of each of the two stages that blocks pass on their way in
ALIGNMENT = 64  # bytes: JAX copies what begins elsewhere
WAIT_S = 30.0
WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}  # wider ones JAX narrows in silence

Caches = list[Any]  # an item a layer, as they were given
Layers = list[list[Any]]  # jax.Array: one or two of each layer
Ids = NDArray[np.int32]


class PagedPool:
    """Moves blocks between an engine and the paged caches of one model. Safe from any thread.

    caches: an item a layer, of which only shape, dtype and sharding are looked at: (K, V), both
    [blocks, tokens, heads, dim]; one such array of latents; or, `interleaved`, one array of heads
    K0 V0 K1 V1 ..., [blocks, tokens, 2 * heads, dim] or packed [blocks, tokens, groups, packing,
    dim], the last group padded. They may be sharded over devices of this process, by heads say; a
    process of several gives its own shards, and `names.part(heads=...)` of them. Frames have the
    order of axes that the layout says. host_kind: the memory through which blocks leave a device;
    "pinned_host" where there is one, and the device is no CPU. Raises LayoutError for what does not
    fit.
    """

    def __init__(
        self,
        engine: Engine | Client,
        names: Namespace,
        caches: Sequence[Any],
        *,
        interleaved: bool = False,
        host_kind: str | None = None,
        staged_bytes: int = STAGED_BYTES,
    ) -> None:
        layout = names.view.layout
        self._engine, self._form = engine, Form(layout, interleaved)
        self._guard = Guard(engine, "jax")
        layers = [_arrays(item) for item in caches]
        self._blocks = self._form.check(layers)
        self._shapes = [tuple(array.shape[1:]) for array in layers[0]]
        size = layout.layers * layout.item_bytes * sum(map(math.prod, self._shapes))
        self._capacity = max(1, min(self._blocks, staged_bytes // size))
        self._staged = [_staged(array.sharding) for array in layers[0]]
        devices = sorted(layers[0][0].sharding.device_set, key=lambda each: int(each.id))
        on_cpu = devices[0].platform == "cpu"
        self._host_kind = _host_kind(devices[0], host_kind)
        self._direct = on_cpu and len(devices) == 1
        # What JAX computes with: words where its CPU backend would make other floats of these.
        self._dtype = WORDS[layout.item_bytes] if on_cpu and layout.item_bytes < 4 else layout.dtype
        self._lock = threading.Lock()
        self._stages = [Stage(self._form, self._shapes, self._capacity)]
        shardings = [[array.sharding for array in arrays] for arrays in layers]
        self._scatter = jax.jit(self._scattered, donate_argnums=0, out_shardings=shardings)
        self._gather = jax.jit(self._gathered)

    def load(
        self,
        lease: Lease,
        caches: Sequence[Any],
        block_table: object,
        first: int = 0,
        timeout_s: float = WAIT_S,
    ) -> tuple[Caches, int]:
        """Load leased blocks from `first` on; return the caches, and how many leading ones are in.

        block_table: int[k], where they go. The caches are donated: use those that are returned.
        What is not verified after `timeout_s` is not in, nor is what follows it: to be recomputed.
        Waits until all is done. Raises LayoutError for ids and keys that do not fit.
        """
        self._form.check_keys(lease.keys)
        ids = _ids(block_table, self._blocks, unique=True)
        if len(ids) > lease.blocks - first:
            raise LayoutError(
                f"a table for {len(ids)} blocks, the lease has {lease.blocks - first} from {first}"
            )
        with self._lock:
            try:
                layers, done = self._load(
                    lease, [_arrays(item) for item in caches], ids, first, timeout_s
                )
            except BaseException:
                self._stages.clear()  # the engine may write to them still
                raise
        return _like(caches, layers), done

    def save(
        self,
        keys: BlockKeys,
        caches: Sequence[Any],
        block_table: object,
        *,
        retention: Retention | Sequence[Retention] = (),
        fill: bytes | None = None,
    ) -> Transfer:
        """Begin to store blocks that the engine does not hold; the caches are free on return.

        block_table: int[len(keys)], where they lie. The rest is as `engine.save` has it, which
        reads a copy of the blocks. Raises LayoutError for ids and keys that do not fit.
        """
        self._form.check_keys(keys)
        ids = _ids(block_table, self._blocks, unique=False)
        if len(ids) != len(keys):
            raise LayoutError(f"a table for {len(ids)} blocks and {len(keys)} keys: one for each")
        places = np.zeros(_bucket(len(ids)), dtype=np.int32)
        places[: len(ids)] = ids
        gathered = self._gather([_arrays(item) for item in caches], places)
        if self._host_kind is not None:
            kind = self._host_kind
            gathered = [
                jax.device_put(each, each.sharding.with_memory_kind(kind)) for each in gathered
            ]
        jax.block_until_ready(gathered)
        shown = [view(each if self._direct else np.asarray(each)) for each in gathered]
        cache = self._form.cache(shown, writable=False)
        table = np.arange(len(ids))
        return self._guard.guarded(
            lambda: self._engine.save(keys, cache, table, retention=retention, fill=fill),
            lambda: _refused(len(ids), self._form.layout.layers),
        )

    def _load(
        self, lease: Lease, layers: Layers, ids: Ids, first: int, timeout_s: float
    ) -> tuple[Layers, int]:
        """Load by windows: the engine fills one stage while XLA scatters the other."""
        windows = [ids[at : at + self._capacity] for at in range(0, len(ids), self._capacity)]
        under_way = [self._begin(lease, first, windows[0], 0)] if windows else []
        done = 0
        for number, window in enumerate(windows):
            stage, transfer = under_way.pop()
            if transfer is None:
                break
            if not transfer.wait(timeout_s):
                transfer.stop()
                self._stages.remove(stage)  # the engine may write to it still
                break
            good = transfer.blocks
            if number:
                jax.block_until_ready(layers)  # the other stage has been read
            if good == len(window) and number + 1 < len(windows):
                place = (first + done + good, windows[number + 1], number + 1)
                under_way.append(self._begin(lease, *place))
            if good:
                layers = self._put(stage, layers, window[:good])
            done += good
            if not under_way:
                break
        jax.block_until_ready(layers)
        return layers, done

    def _begin(
        self, lease: Lease, first: int, window: Ids, number: int
    ) -> tuple[Stage, Transfer | None]:
        """Have the engine fill one of two stages, in turns. No transfer: something has failed."""
        while len(self._stages) <= number % 2:
            self._stages.append(Stage(self._form, self._shapes, self._capacity))
        stage = self._stages[number % 2]
        table = np.arange(len(window))

        def begin() -> Transfer | None:
            return self._engine.load(lease, stage.cache, table, first=first)

        return stage, self._guard.guarded(begin, lambda: None)

    def _put(self, stage: Stage, layers: Layers, window: Ids) -> Layers:
        """Scatter a stage's leading blocks into the pool."""
        places = np.zeros(self._capacity, dtype=np.int32)
        places[: len(window)] = window
        staged = [
            self._shown(words, len(window), where)
            for words, where in zip(stage.words, self._staged, strict=True)
        ]
        found: Layers = self._scatter(layers, places, np.int32(len(window)), staged)
        return found

    def _shown(self, words: NDArray[Any], count: int, where: Any) -> Any:
        """Show a stage to JAX; what lies on another device or several gets a copy of its blocks."""
        if self._direct:
            shown = replace(view(words), dtype=self._dtype)
            return jax.device_put(jax.dlpack.from_dlpack(export(shown), copy=False), where)
        some = words[:, : min(_bucket(count), self._capacity)]
        return jax.device_put(some.view(jnp.dtype(self._dtype)), where)

    def _scattered(self, layers: Layers, places: Any, count: Any, staged: list[Any]) -> Layers:
        """Put blocks [layers, k, ...] to their places, one after the other: XLA copies no more."""

        def put(at: Any, layers: Layers) -> Layers:
            return [
                [
                    lax.dynamic_update_slice_in_dim(array, blocks[number, at][None], places[at], 0)
                    for array, blocks in zip(arrays, staged, strict=True)
                ]
                for number, arrays in enumerate(layers)
            ]

        def cast(layers: Layers, dtype: str) -> Layers:
            return [[lax.bitcast_convert_type(each, dtype) for each in row] for row in layers]

        if self._dtype == self._form.layout.dtype:
            return lax.fori_loop(0, count, put, layers)  # type: ignore[no-any-return]  # no types
        found = lax.fori_loop(0, count, put, cast(layers, self._dtype))
        return cast(found, self._form.layout.dtype)

    def _gathered(self, layers: Layers, places: Any) -> list[Any]:
        """Take blocks out: [layers, k, ...]."""

        def taken(array: Any) -> Any:
            if self._dtype != self._form.layout.dtype:
                array = lax.bitcast_convert_type(array, self._dtype)
            return array.at[places].get(mode="promise_in_bounds")

        return [jnp.stack([taken(each) for each in arrays]) for arrays in zip(*layers, strict=True)]


class Form:
    """How a layer's caches hold K and V: apart, or interleaved on the axis of heads."""

    def __init__(self, layout: Layout, interleaved: bool) -> None:
        if layout.is_opaque or layout.item_bytes not in WORDS:
            given = "opaque pages" if layout.is_opaque else layout.dtype
            raise LayoutError(f"a layout of {given}, which JAX's caches do not have")
        if interleaved and layout.head_dim != layout.head_dim_v:
            raise LayoutError(
                f"interleaved K and V of {layout.head_dim} and {layout.head_dim_v} elements, "
                "expected equal ones: give them apart"
            )
        self.layout = replace(layout, paged=True)
        self._interleaved = interleaved

    def check(self, layers: Layers) -> int:
        """Return the blocks of the pool. Raises LayoutError for caches of another form."""
        layout = self.layout
        if len(layers) != layout.layers:
            raise LayoutError(f"caches of {len(layers)} layers, the layout has {layout.layers}")
        dims = layout.head_dims[:1] if self._interleaved else layout.head_dims
        blocks = int(layers[0][0].shape[0])
        for number, arrays in enumerate(layers):
            if len(arrays) != len(dims):
                raise LayoutError(f"layer {number}: {len(arrays)} arrays, expected {len(dims)}")
            for array, dim, one in zip(arrays, dims, layers[0], strict=True):
                if not self._fits(array.shape, blocks, dim) or array.shape != one.shape:
                    raise LayoutError(
                        f"layer {number} has an array of shape {list(array.shape)}, expected "
                        f"{self._expected(blocks, dim)}, the same in all layers"
                    )
                if array.dtype.name != layout.dtype:
                    raise LayoutError(
                        f"layer {number} is {array.dtype.name}, the layout says {layout.dtype}"
                    )
                if not array.is_fully_addressable:
                    raise LayoutError(
                        f"layer {number} is sharded over several processes: give each one's own "
                        "shards, and names.part(heads=...) of them"
                    )
        return blocks

    def check_keys(self, keys: BlockKeys) -> None:
        """Raise LayoutError for keys whose blocks are not as the caches' are."""
        if keys.namespace.view.layout.digest() != self.layout.digest():
            raise LayoutError("keys of a namespace of another layout than the pool's were given")

    def cache(self, words: Sequence[View], *, writable: bool) -> PagedCache:
        """Describe words [layers, blocks, ...] to the engine, an array of them a component."""
        layers = [
            self._components([each.select(0, number) for each in words])
            for number in range(self.layout.layers)
        ]
        return PagedCache(self.layout, layers, writable)

    def _components(self, words: list[View]) -> list[View]:
        found = [replace(each, dtype=self.layout.dtype) for each in words]
        if self._interleaved:
            found = _halves(found[0], self.layout.kv_heads)
        return [_swapped(each) for each in found] if self.layout.order == "HND" else found

    def _fits(self, shape: tuple[int, ...], blocks: int, dim: int) -> bool:
        if shape[:2] != (blocks, self.layout.block_tokens) or shape[-1] != dim:
            return False
        if self._interleaved and len(shape) == 5:
            return -(-2 * self.layout.kv_heads // shape[3]) == shape[2]
        return shape[2:-1] == ((2 if self._interleaved else 1) * self.layout.kv_heads,)

    def _expected(self, blocks: int, dim: int) -> str:
        lead = f"{blocks}, {self.layout.block_tokens}"
        if not self._interleaved:
            return f"[{lead}, {self.layout.kv_heads}, {dim}]"
        both = 2 * self.layout.kv_heads
        return f"[{lead}, {both}, {dim}] or [{lead}, groups, packing, {dim}] of {both} heads"


class Stage:
    """Memory of ours that blocks pass on their way in: words [layers, blocks, ...] a component."""

    def __init__(self, form: Form, shapes: Sequence[tuple[int, ...]], capacity: int) -> None:
        layout = form.layout
        self.words = [
            _aligned((layout.layers, capacity, *shape), WORDS[layout.item_bytes])
            for shape in shapes
        ]
        self.cache = form.cache([view(each) for each in self.words], writable=True)


def _refused(count: int, layers: int) -> Transfer:
    """Return the transfer of a save that has failed."""
    transfer = Transfer(count, layers)
    transfer.finish(transfer.good, 0, "refused")
    return transfer


def _aligned(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return zeros that begin where JAX takes them without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _halves(joined: View, heads: int) -> list[View]:
    """Take K and V apart that alternate on the axis of heads, which may be packed in groups."""
    shape, strides = joined.shape, joined.strides
    if len(shape) == 5:
        assert joined.compact(3)
        shape, strides = (*shape[:2], shape[2] * shape[3], shape[4]), (*strides[:2], *strides[3:])
    pairs = (*strides[:2], 2 * strides[2], strides[3])
    return [
        replace(
            joined,
            address=joined.address + half * strides[2],
            shape=(*shape[:2], heads, shape[3]),
            strides=pairs,
        )
        for half in (0, 1)
    ]


def _swapped(given: View) -> View:
    """Show [blocks, tokens, heads, dim] as [blocks, heads, tokens, dim]."""
    (b, t, h, d), (sb, st, sh, sd) = given.shape, given.strides
    return replace(given, shape=(b, h, t, d), strides=(sb, sh, st, sd))


def _arrays(item: Any) -> list[Any]:
    return [*item] if isinstance(item, tuple | list) else [item]


def _like(caches: Sequence[Any], layers: Layers) -> Caches:
    """Give arrays back in the form in which they came."""
    return [
        tuple(arrays) if isinstance(item, tuple | list) else arrays[0]
        for item, arrays in zip(caches, layers, strict=True)
    ]


def _ids(given: object, blocks: int, *, unique: bool) -> Ids:
    """Return block ids as int32: JAX would narrow wider ones in silence."""
    ids = np.asarray(given)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise LayoutError(f"block_table is {ids.dtype}{list(ids.shape)}, expected int[k]")
    if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < blocks):
        raise LayoutError(
            f"block_table names {int(ids.min())}..{int(ids.max())}, the pool has 0..{blocks - 1}"
        )
    if unique and len(np.unique(ids)) != len(ids):
        raise LayoutError("block_table names a block twice: give each block a place of its own")
    return ids.astype(np.int32)


def _bucket(count: int) -> int:
    """Round up to a power of two: jit compiles for each."""
    return 1 << max(0, count - 1).bit_length()


def _staged(sharding: Any) -> Any:
    """Return the sharding of blocks [layers, k, ...] that go into a pool [blocks, ...]."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, None, *sharding.spec[1:]))
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    raise LayoutError(
        f"caches with a {type(sharding).__name__}, expected those of one device, or of a mesh with "
        "a NamedSharding"
    )


def _host_kind(device: Any, asked: str | None) -> str | None:
    """Return the kind of memory that blocks leave through; None: the device's own."""
    kinds = {str(each.kind) for each in device.addressable_memories()}
    if asked is not None and asked not in kinds:
        raise LayoutError(f"host_kind {asked!r}, {device} has {', '.join(sorted(kinds))}")
    pinned = "pinned_host" in kinds and device.platform != "cpu"
    return asked or ("pinned_host" if pinned else None)
