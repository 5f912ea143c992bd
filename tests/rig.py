"""Caches for tests of the engine, independent of kvengine.cache: filled, poisoned, compared.

Imported by tests, and by the programs that tests run as processes of their own.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import kvengine
from kvengine import Engine, Layout, Transfer

POISON = 0xA5
WAIT_S = 30.0
TESTS = Path(__file__).resolve().parent
PLAIN = {"uint8": np.uint8, "int8": np.int8}
Caches = list[tuple[np.ndarray, ...]]


def layout(**changes) -> Layout:
    """A small layout of 2 layers: a frame has 4 KiB of header and 16 KiB of payload."""
    fields = {"layers": 2, "kv_heads": 2, "head_dim": 32, "head_dim_v": 32, "dtype": "float32"}
    return Layout(**(fields | changes))


def numpy_dtype(name: str) -> np.dtype:
    """The dtype by torch's name; those that numpy lacks come from ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


def shapes(of: Layout, blocks: int) -> list[tuple[int, ...]]:
    """The shape of each component of a layer of a cache with so many blocks."""
    if of.is_opaque:
        return [(blocks, of.head_dim)]
    found = []
    for dim in of.head_dims:
        axes = [of.kv_heads, dim]
        axes.insert(0 if of.order == "NHD" else 1, of.block_tokens * (1 if of.paged else blocks))
        found.append((*([blocks] if of.paged else []), *axes))
    return found


def caches(of: Layout, blocks: int, seed: int | None = None) -> Caches:
    """One tuple of arrays a layer, of random bytes; without a seed full of POISON."""
    draw = None if seed is None else np.random.default_rng(seed)
    dtype = numpy_dtype(of.dtype)
    made = []
    for _ in range(of.layers):
        arrays = []
        for shape in shapes(of, blocks):
            size = (*shape[:-1], shape[-1] * dtype.itemsize)
            raw = np.full(size, POISON, np.uint8)
            if draw is not None:
                raw = draw.integers(0, 256, size, dtype=np.uint8)
            arrays.append(raw.view(dtype))
        made.append(tuple(arrays))
    return made


def cut(of: Layout, whole: Caches, layers: tuple[int, int], heads: tuple[int, int]) -> Caches:
    """A rank's own arrays: these layers and heads of a whole cache."""
    axis = -2 if of.order == "NHD" else -3
    take = (slice(*heads), *[slice(None)] * (-1 - axis))
    return [
        tuple(
            each.copy() if of.is_opaque else np.ascontiguousarray(each[(..., *take)])
            for each in layer
        )
        for layer in whole[slice(*layers)]
    ]


def by_token(of: Layout, array: np.ndarray) -> np.ndarray:
    """The bytes of a component as uint8[slots, rest]; of opaque pages a slot is a page."""
    raw = array.view(np.uint8)
    if of.is_opaque:
        return raw
    if of.order == "HND":
        raw = raw.swapaxes(-2, -3)
    return raw.reshape(-1, raw.shape[-2] * raw.shape[-1])


def slots_of(of: Layout, table: Sequence[int]) -> np.ndarray:
    """The slots of the tokens of blocks, in order: a slot mapping equal to the block table."""
    step = 1 if of.is_opaque else of.block_tokens
    return (np.asarray(table, np.int64)[:, None] * step + np.arange(step)).reshape(-1)


def same(of: Layout, one: Caches, here: Sequence[int], other: Caches, there: Sequence[int]) -> bool:
    """Whether the slots `here` of one cache hold what the slots `there` of the other hold."""
    return all(
        np.array_equal(by_token(of, a)[np.asarray(here)], by_token(of, b)[np.asarray(there)])
        for layer, twin in zip(one, other, strict=True)
        for a, b in zip(layer, twin, strict=True)
    )


def untouched(of: Layout, cache: Caches, written: Sequence[int]) -> bool:
    """Whether all slots but those written are still POISON."""
    for layer in cache:
        for array in layer:
            rows = by_token(of, array)
            rest = np.ones(len(rows), dtype=bool)
            rest[np.asarray(written, np.int64)] = False
            if not (rows[rest] == POISON).all():
                return False
    return True


def names(engine: Engine, of: Layout, **identity) -> kvengine.Namespace:
    return engine.namespace(**({"model": "m", "layout": of} | identity))


def prompt(blocks: int, of: Layout, seed: int = 0) -> np.ndarray:
    """Tokens of so many full blocks; prompts of one seed share their prefix."""
    return np.random.default_rng(seed).integers(0, 32000, 4096)[: blocks * of.block_tokens]


def save(engine: Engine, keys, cache, table=None, **how) -> Transfer:
    """Save all blocks of a cache in order, or those of the table; wait."""
    if table is None and "slot_mapping" not in how:
        table = np.arange(len(keys))
    transfer = engine.save(keys, cache, table, **how)
    assert transfer.wait(WAIT_S)
    return transfer


def load(engine: Engine, keys, cache, table=None, **how) -> Transfer:
    """Match, load what is matched to the places of the table (in order without one); wait."""
    with engine.match(keys) as lease:
        if "slot_mapping" not in how:
            table = (np.arange(len(keys)) if table is None else np.asarray(table))[: lease.blocks]
        transfer = engine.load(lease, cache, table, **how)
    assert transfer.wait(WAIT_S)
    return transfer


def check_right(engine: Engine, keys, source: Caches, *, first: int = 0) -> np.ndarray:
    """Load into a poisoned cache: what is called good is right. Returns `good` for all keys.

    `first`: where the keys' blocks begin in `source`.
    """
    of = keys.namespace.layout
    target = caches(of, len(keys))
    transfer = load(engine, keys, target)
    good = np.zeros(len(keys), dtype=bool)
    good[: len(transfer.good)] = transfer.good
    for block in np.flatnonzero(good).tolist():
        here, there = slots_of(of, [block]), slots_of(of, [first + block])
        assert same(of, target, here, source, there), f"wrong bytes in block {block}"
    return good


def poll(condition: Callable[[], object], timeout_s: float = WAIT_S) -> bool:
    """Whether the condition became true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def python(code: str, *args: object, **changes) -> subprocess.CompletedProcess[str]:
    """Run a program that may import this module; `changes` go to its environment."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=60,
    )


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """Start a program that may import this module, with pipes; the caller ends it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TESTS)} | changes
