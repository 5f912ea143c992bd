"""The device path of `copy.Moves`: the raw copy as a Triton kernel, all layers and blocks at once.

Imports triton and torch, so it is imported on use only. With TRITON_INTERPRET=1 set before that,
the kernel runs on the CPU, on the addresses of any array. Digests are not computed here.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl

from kvengine.kernels import copy
from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Moves, Span

TILE = 2048  # words of a program: 4 warps, 16 bytes a thread, four loads in flight for each
COLS_MAX = 1024  # of them along a run

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
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    row = components_ptr + (first_component + tl.program_id(1)).to(tl.int64) * _COLUMNS
    VECTOR: tl.constexpr = ALIGN // WORD
    outer = tl.load(row + _OUTER)
    inner = tl.load(row + _INNER)
    # the hint is for the mask: without it no load is wider than a word
    words = tl.multiple_of(tl.load(row + _RUN) // WORD, VECTOR)
    columns = (words + COLS - 1) // COLS
    runs = count_units * outer * inner
    run = tile // columns * ROWS + tl.arange(0, ROWS)  # [ROWS]
    word = tile % columns * COLS + tl.arange(0, COLS)  # [COLS]
    mask = (run < runs)[:, None] & (word < words)[None, :]
    u = run // (outer * inner)
    a = run // inner % outer
    b = run % inner

    group = tl.load(row + _GROUP)
    offset = tl.load(
        offsets_ptr + (group * count_blocks + n) * count_units + u, mask=run < runs, other=0
    )
    cache = tl.load(row + _BASE) + offset
    cache += a * tl.load(row + _OUTER_CACHE) + b * tl.load(row + _INNER_CACHE)
    frame = tl.load(frames_ptr + n) + tl.load(row + _FRAME) + u * tl.load(row + _UNIT_FRAME)
    frame += a * tl.load(row + _OUTER_FRAME) + b * tl.load(row + _INNER_FRAME)

    kind: tl.constexpr = tl.pointer_type(tl.int32 if WORD == 4 else tl.int8)
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    cache_ptr = tl.multiple_of(cache[:, None].to(kind), [ALIGN, ALIGN])
    frame_ptr = tl.multiple_of(frame[:, None].to(kind), [ALIGN, ALIGN])
    if GATHER:
        data = tl.load(cache_ptr + word[None, :], mask=mask)
        tl.store(frame_ptr + word[None, :], data, mask=mask)
    else:
        data = tl.load(frame_ptr + word[None, :], mask=mask)
        tl.store(cache_ptr + word[None, :], data, mask=mask)


def gather(moves: Moves, blocks: Span, segments: Span, device: str) -> None:
    """Copy cache -> frames in one launch on `device`'s current stream, without digests.

    Every address of `moves` is one that the device can reach, and stays so until the stream has
    passed the launch. Ranges as in `copy.gather`. `device` is torch's name of it.
    """
    _launch(moves, blocks, segments, device, True)


def scatter(moves: Moves, blocks: Span, segments: Span, device: str) -> None:
    """Copy frames -> cache, of segments that are verified already; otherwise as `gather`."""
    _launch(moves, blocks, segments, device, False)


def alignment(moves: Moves) -> int:
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
    tables = (moves.components[:, columns], moves.offsets, moves.frames)
    return math.gcd(16, *(int(np.gcd.reduce(table, axis=None)) for table in tables))


def _launch(moves: Moves, blocks: Span, segments: Span, device: str, gathers: bool) -> None:
    groups, count_blocks, count_units = moves.offsets.shape
    rows = moves.segments[slice(*segments)]
    if blocks[0] == blocks[1] or len(rows) == 0:
        return
    first = int(rows[:, copy.FIRST].min())
    last = int((rows[:, copy.FIRST] + rows[:, copy.COUNT]).max())
    assert int(rows[:, copy.COUNT].sum()) == last - first  # one stretch of components
    components = moves.components[first:last]
    align = alignment(moves)
    word = 4 if align % 4 == 0 else 1
    words = components[:, copy.RUN] // word
    cols = min(triton.next_power_of_2(int(words.max())), COLS_MAX)
    runs = count_units * components[:, copy.OUTER] * components[:, copy.INNER]
    tiles = int((-(-runs // (TILE // cols)) * -(-words // cols)).max())
    tables = [
        torch.from_numpy(table).to(device, non_blocking=False)
        for table in (moves.components, moves.offsets, moves.frames)
    ]
    copy_runs_kernel[((blocks[1] - blocks[0]) * tiles, last - first)](
        *tables,
        blocks[0],
        first,
        count_blocks,
        count_units,
        tiles,
        GATHER=gathers,
        WORD=word,
        ALIGN=align,
        ROWS=TILE // cols,
        COLS=cols,
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


# Of real models: runs of whole blocks, of a token's heads, of one head; then what narrower
# addresses come to.
VARIANTS = tuple(
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
)
