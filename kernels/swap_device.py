"""Copy a list of spans between memory of the host and of a device, in few persistent programs.

For many small pages (4 to 24 KiB), where a copy engine spends its time on descriptors, and for
pinned host memory, which a program reads and writes at the link's speed while it occupies a few of
the many multiprocessors. Spans are cut into tiles on the host; each program takes every n-th one.
Imports triton, so it is imported on use only. On a host alone,
`copy.copy_spans` is the fast path.
"""

import ctypes
import math

import numpy as np
import triton
import triton.language as tl

from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Int64s, expect_spans
from kvengine.kernels.launch import Launcher, launcher

# 12 programs x 128 threads x 8 loads of 16 bytes are 196 KiB in flight: a link of 55 GB/s with a
# round trip of 2 us is busy with 110 KiB.
PROGRAMS = 12
TILE_BYTES = 16 << 10
NARROW_WORDS = 2048  # of a tile whose words are moved one by one: more would be more registers


@triton.jit
def swap_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    tiles_ptr,  # int64[count, 3]: source, target, nbytes
    count,
    WORD: tl.constexpr,  # bytes, 4 or 1
    ALIGN: tl.constexpr,  # bytes that divide every address and size
    WORDS: tl.constexpr,  # of a tile
):
    VECTOR: tl.constexpr = ALIGN // WORD
    kind: tl.constexpr = tl.pointer_type(tl.int32 if WORD == 4 else tl.int8)
    word = tl.arange(0, WORDS)
    tile = tl.program_id(0)
    while tile < count:
        row = tiles_ptr + tile.to(tl.int64) * 3
        # the hints come after the cast, and for the mask: without them accesses are narrow
        source = tl.multiple_of(tl.load(row).to(kind), ALIGN)
        target = tl.multiple_of(tl.load(row + 1).to(kind), ALIGN)
        words = tl.multiple_of((tl.load(row + 2) // WORD).to(tl.int32), VECTOR)
        mask = word < words
        tl.store(target + word, tl.load(source + word, mask=mask), mask=mask)
        tile += tl.num_programs(0)


def swap(
    sources: Int64s,
    targets: Int64s,
    nbytes: Int64s,
    device: str | Launcher,
    programs: int = PROGRAMS,
) -> None:
    """Copy nbytes[i] bytes from address sources[i] to targets[i], in the device's current stream.

    sources, targets, nbytes: int64[n]. The device can reach every address, and the memory stays
    until the stream has passed the launch; targets do not overlap one another or a source. Spans
    that all begin and end on multiples of 16 bytes move 16 bytes at a time. Raises ValueError for
    tables that do not fit, for sizes below 0 and for no programs.
    """
    expect_spans(sources, targets, nbytes)
    align = math.gcd(16, *(int(np.gcd.reduce(table)) for table in (sources, targets, nbytes)))
    words = words_of(align)
    word = word_of(align)
    tiles = cut(sources, targets, nbytes, words * word)
    if programs < 1:
        raise ValueError(f"{programs} programs, expected at least 1")
    if not len(tiles):
        return
    on = launcher(device)
    on.run(
        swap_kernel,
        (min(programs, len(tiles)),),
        (on.table(tiles), len(tiles)),
        {"WORD": word, "ALIGN": align, "WORDS": words},
    )


def word_of(align: int) -> int:
    """Return the bytes of a word that addresses of this alignment are read by."""
    return 4 if align % 4 == 0 else 1


def words_of(align: int) -> int:
    """Return the words of a tile."""
    return TILE_BYTES // 4 if align > 4 else NARROW_WORDS


def cut(sources: Int64s, targets: Int64s, nbytes: Int64s, tile_bytes: int) -> Int64s:
    """Cut spans into tiles of at most `tile_bytes`: int64[tiles, 3], (source, target, nbytes)."""
    tiles = -(-nbytes // tile_bytes)
    span = np.repeat(np.arange(len(nbytes)), tiles)
    first = np.cumsum(tiles) - tiles
    at = (np.arange(len(span)) - first[span]) * tile_bytes
    size = np.minimum(nbytes[span] - at, tile_bytes)
    return np.stack([sources[span] + at, targets[span] + at, size], axis=1)


def swap_reference(sources: Int64s, targets: Int64s, nbytes: Int64s) -> None:
    """Do what `swap` does, byte by byte."""
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), nbytes.tolist(), strict=True
    ):
        place = (ctypes.c_uint8 * size).from_address(target)
        place[:] = bytes((ctypes.c_uint8 * size).from_address(source))


VARIANTS = tuple(
    Variant(
        f"swap by {align} bytes",
        swap_kernel,
        signature={"tiles_ptr": "*i64", "count": "i32"},
        constants={"WORD": word_of(align), "ALIGN": align, "WORDS": words_of(align)},
        aligned=("tiles_ptr",),
        load_bits=8 * align,
        store_bits=8 * align,
        registers_max=96,
    )
    for align in (16, 8, 4, 1)
)
