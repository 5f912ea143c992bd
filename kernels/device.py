"""The device path of `copy.Moves`: the raw copy as a Triton kernel, all layers and blocks at once.

Where a table of ids lies on the device, `Ids` says how to read it: ids out of range are counted in
an error word and move nothing. Imports triton, so it is imported on use only. With
TRITON_INTERPRET=1 set before that, the kernels run on the CPU, on the addresses of any array.
Digests are not computed here but in `xxh3_device.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvengine.kernels import copy
from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Int64s, Moves, Span
from kvengine.kernels.launch import Launcher, expect_memory, launcher
from kvengine.kernels.rows import Rows

TILE = 2048  # words of a program: 4 warps, 16 bytes a thread, four loads in flight for each
COLS_MAX = 1024  # of them along a run

IDS_TILE = 512  # ids of a program

_LOST = tl.constexpr(-(1 << 63))  # the offset of an id that is out of range
_COLUMNS = tl.constexpr(copy.COLUMNS)
_BASE = tl.constexpr(copy.BASE)
_GROUP = tl.constexpr(copy.GROUP)
_OUTER = tl.constexpr(copy.OUTER)
_OUTER_CACHE = tl.constexpr(copy.OUTER_CACHE)
_OUTER_FRAME = tl.constexpr(copy.OUTER_FRAME)
_INNER = tl.constexpr(copy.INNER)
_INNER_CACHE = tl.constexpr(copy.INNER_CACHE)
_INNER_FRAME = tl.constexpr(copy.INNER_FRAME)
_RUN = tl.constexpr(copy.RUN)
_UNIT_FRAME = tl.constexpr(copy.UNIT_FRAME)
_FRAME = tl.constexpr(copy.FRAME)


@triton.jit
def copy_runs_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,  # int64[C, 11]
    offsets_ptr,  # int64[G, N, U]
    frames_ptr,  # int64[N]
    first_block,
    first_component,
    count_blocks,  # N
    count_units,  # U
    tiles,  # programs of a component of a block
    GATHER: tl.constexpr,
    WORD: tl.constexpr,  # bytes, 4 or 1
    ALIGN: tl.constexpr,  # bytes that divide every address
    ROWS: tl.constexpr,  # runs of a program
    COLS: tl.constexpr,  # words of each of them
):
    n = (first_block + tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = components_ptr + (first_component + tl.program_id(1)).to(tl.int64) * _COLUMNS
    VECTOR: tl.constexpr = ALIGN // WORD
    # counts are 32 bits wide: a division of 64 bits is a long routine
    outer = tl.load(row + _OUTER).to(tl.int32)
    inner = tl.load(row + _INNER).to(tl.int32)
    # the hint is for the mask: without it no load is wider than a word
    words = tl.multiple_of((tl.load(row + _RUN) // WORD).to(tl.int32), VECTOR)
    columns = (words + COLS - 1) // COLS
    runs = count_units * outer * inner
    run = tile // columns * ROWS + tl.arange(0, ROWS)  # [ROWS]
    word = tile % columns * COLS + tl.arange(0, COLS)  # [COLS]
    u = run // (outer * inner)
    a = (run // inner % outer).to(tl.int64)
    b = (run % inner).to(tl.int64)

    group = tl.load(row + _GROUP)
    offset = tl.load(
        offsets_ptr + (group * count_blocks + n) * count_units + u, mask=run < runs, other=0
    )
    known = (run < runs) & (offset != _LOST)
    cache = tl.load(row + _BASE) + offset
    cache += a * tl.load(row + _OUTER_CACHE) + b * tl.load(row + _INNER_CACHE)
    frame = tl.load(frames_ptr + n) + tl.load(row + _FRAME) + u * tl.load(row + _UNIT_FRAME)
    frame += a * tl.load(row + _OUTER_FRAME) + b * tl.load(row + _INNER_FRAME)

    kind: tl.constexpr = tl.pointer_type(tl.int32 if WORD == 4 else tl.int8)
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    cache_ptr = tl.multiple_of(cache[:, None].to(kind), [ALIGN, ALIGN])
    frame_ptr = tl.multiple_of(frame[:, None].to(kind), [ALIGN, ALIGN])
    inside = (word < words)[None, :]
    if GATHER:  # a block that nobody knows is all zeros: every byte of a frame is written
        data = tl.load(cache_ptr + word[None, :], mask=known[:, None] & inside, other=0)
        tl.store(frame_ptr + word[None, :], data, mask=(run < runs)[:, None] & inside)
    else:
        data = tl.load(frame_ptr + word[None, :], mask=known[:, None] & inside)
        tl.store(cache_ptr + word[None, :], data, mask=known[:, None] & inside)


@triton.jit
def offsets_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    ids_ptr,  # int32 or int64[count]
    strides_ptr,  # int64[G, 2]
    offsets_ptr,  # int64[G, count]
    error_ptr,  # int32[1]
    count,
    limit,
    page,
    TILE: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < count
    id = tl.load(ids_ptr + place, mask=mask, other=0).to(tl.int64)
    good = (id >= 0) & (id < limit)
    id = tl.where(good, id, 0).to(tl.int32)  # as 64 bits, division is a long routine
    offset = (id // page).to(tl.int64) * tl.load(strides_ptr + 2 * group)
    offset += (id % page).to(tl.int64) * tl.load(strides_ptr + 2 * group + 1)
    tl.store(offsets_ptr + group * count + place, tl.where(good, offset, _LOST), mask=mask)
    if group == 0:
        lost = tl.sum((mask & ~good).to(tl.int32))
        if lost > 0:
            tl.atomic_add(error_ptr, lost)


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids on the device that say where the units of each block lie, in the place of `offsets`.

    ids: int32[N, U] or int64[N, U], device memory: block ids, or slots. strides: int64[G, 2], for
    each group the bytes from one page of the cache to the next, and from one token of a page to the
    next. page: tokens of a page for slots, 1 for block ids. limit: ids are 0..limit-1. error:
    int32[1], device memory that starts as 0: each launch adds the ids out of range. Read it once
    the work is over: where it is not 0, frames hold zeros for those ids, and caches were left
    alone.
    """

    ids: Any
    strides: Int64s
    limit: int
    error: Any
    page: int = 1

    def __post_init__(self) -> None:
        copy.expect("strides", self.strides, np.int64, (None, 2))
        if self.page < 1 or not 0 <= self.limit < 1 << 31:
            raise ValueError(f"pages of {self.page} tokens and {self.limit} ids: no such cache")

    def offsets(self, moves: Moves | Rows, on: Launcher) -> Any:
        """Work out the offsets of `moves`' units on the device: int64[G, N, U]."""
        groups, count_blocks, count_units = moves.offsets.shape
        if self.strides.shape[0] != groups or tuple(self.ids.shape) != (count_blocks, count_units):
            raise ValueError(
                f"ids are {tuple(self.ids.shape)} with strides of {self.strides.shape[0]} groups, "
                f"expected {(count_blocks, count_units)} with {groups}"
            )
        count = count_blocks * count_units
        kind = str(self.ids.dtype).rpartition(".")[2]
        if kind not in ("int32", "int64"):
            raise TypeError(f"ids are {kind}, expected int32 or int64")
        expect_memory("ids", self.ids, np.dtype(kind).itemsize, count)
        expect_memory("error", self.error, 4, 1)
        offsets = on.empty(moves.offsets.shape, np.int64)
        on.run(
            offsets_kernel,
            (triton.cdiv(count, IDS_TILE), groups),
            (self.ids, on.table(self.strides), offsets, self.error, count, self.limit, self.page),
            {"TILE": IDS_TILE},
        )
        return offsets


def offsets_reference(
    ids: Int64s, strides: Int64s, limit: int, page: int = 1
) -> tuple[Int64s, int]:
    """Return what `Ids` works out: the offsets, and how many ids were out of range."""
    good = (ids >= 0) & (ids < limit)
    pages, tokens = ids // page, ids % page
    offsets = pages * strides[:, 0, None, None] + tokens * strides[:, 1, None, None]
    return np.where(good, offsets, _LOST.value), int((~good).sum())


def gather(
    moves: Moves, blocks: Span, segments: Span, device: str | Launcher, ids: Ids | None = None
) -> None:
    """Copy cache -> frames in one launch, in the device's current stream, without digests.

    Every address of `moves` is one that the device can reach, and stays so until the stream has
    passed the launch. Ranges as in `copy.gather`. `device` is torch's name of it, or a Launcher;
    with `ids` they stand in for the offsets of `moves`, of which only the shape counts.
    """
    _launch(moves, blocks, segments, device, ids, True)


def scatter(
    moves: Moves, blocks: Span, segments: Span, device: str | Launcher, ids: Ids | None = None
) -> None:
    """Copy frames -> cache, of segments that are verified already; otherwise as `gather`."""
    _launch(moves, blocks, segments, device, ids, False)


def alignment(moves: Moves, ids: Ids | None = None) -> int:
    """Return the bytes, 16 at most and a power of two, that divide every address and run."""
    columns = [
        copy.BASE,
        copy.OUTER_CACHE,
        copy.OUTER_FRAME,
        copy.INNER_CACHE,
        copy.INNER_FRAME,
        copy.RUN,
        copy.UNIT_FRAME,
        copy.FRAME,
    ]
    offsets = moves.offsets if ids is None else ids.strides
    tables = (moves.components[:, columns], offsets, moves.frames)
    return math.gcd(16, *(int(np.gcd.reduce(table, axis=None)) for table in tables))


def _launch(
    moves: Moves,
    blocks: Span,
    segments: Span,
    device: str | Launcher,
    ids: Ids | None,
    gathers: bool,
) -> None:
    _, count_blocks, count_units = moves.offsets.shape
    rows = moves.segments[slice(*segments)]
    if gathers:
        copy.expect_whole(moves)
    if blocks[0] == blocks[1] or len(rows) == 0:
        return
    first = int(rows[:, copy.FIRST].min())
    last = int((rows[:, copy.FIRST] + rows[:, copy.COUNT]).max())
    assert int(rows[:, copy.COUNT].sum()) == last - first  # one stretch of components
    components = moves.components[first:last]
    align = alignment(moves, ids)
    word = 4 if align % 4 == 0 else 1
    words = components[:, copy.RUN] // word
    cols = min(triton.next_power_of_2(int(words.max())), COLS_MAX)
    runs = count_units * components[:, copy.OUTER] * components[:, copy.INNER]
    assert int(runs.max()) < 1 << 31 and int(words.max()) < 1 << 31
    tiles = int((-(-runs // (TILE // cols)) * -(-words // cols)).max())
    on = launcher(device)
    components_table, frames = on.table(moves.components), on.table(moves.frames)
    offsets = on.table(moves.offsets) if ids is None else ids.offsets(moves, on)
    counts = (blocks[0], first, count_blocks, count_units, tiles)
    on.run(
        copy_runs_kernel,
        ((blocks[1] - blocks[0]) * tiles, last - first),
        (components_table, offsets, frames, *counts),
        {"GATHER": gathers, "WORD": word, "ALIGN": align, "ROWS": TILE // cols, "COLS": cols},
    )


def _variant(gathers: bool, what: str, cols: int, align: int) -> Variant:
    word = 4 if align % 4 == 0 else 1
    tables = {"components_ptr": "*i64", "offsets_ptr": "*i64", "frames_ptr": "*i64"}
    counts = ("first_block", "first_component", "count_blocks", "count_units", "tiles")
    return Variant(
        f"{'gather' if gathers else 'scatter'} {what}",
        copy_runs_kernel,
        signature=tables | dict.fromkeys(counts, "i32"),
        constants={
            "GATHER": gathers,
            "WORD": word,
            "ALIGN": align,
            "ROWS": TILE // cols,
            "COLS": cols,
        },
        aligned=tuple(tables),
        elements=TILE * word // 2,
        load_bits=8 * align,
        store_bits=8 * align,
        registers_max=96,  # five programs of 4 warps on a multiprocessor
    )


_OFFSETS = Variant(
    "offsets of ids",
    offsets_kernel,
    signature={
        "ids_ptr": "*i32",
        "strides_ptr": "*i64",
        "offsets_ptr": "*i64",
        "error_ptr": "*i32",
        "count": "i32",
        "limit": "i32",
        "page": "i32",
    },
    constants={"TILE": IDS_TILE},
    aligned=("ids_ptr", "strides_ptr", "offsets_ptr", "error_ptr"),
    load_bits=32,  # few bytes: a block has one id, or one a token
    store_bits=64,
)

# Of real models: runs of whole blocks, of a token's heads, of one head; then what narrower
# addresses come to.
VARIANTS = (
    *(
        _variant(gathers, what, cols, align)
        for gathers in (True, False)
        for what, cols, align in (
            ("blocks", COLS_MAX, 16),
            ("tokens", 512, 16),
            ("heads", 64, 16),
            ("blocks by 8 bytes", COLS_MAX, 8),
            ("blocks by 4 bytes", COLS_MAX, 4),
            ("blocks by 1 byte", COLS_MAX, 1),
        )
    ),
    _OFFSETS,
)
