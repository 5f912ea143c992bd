"""The device path of `lossless.py`: gather and code, or decode and scatter, in one Triton kernel.

A program works on one tile of one block: all layers, K and V and blocks are one launch. Values are
handled in pairs, two bf16 in a word, as they lie in memory. Blocks that are nowhere are coded as
zeros and never decoded, as in `device.py`. Imports triton, so it is imported on use only. With
TRITON_INTERPRET=1 set before that, the kernels run on the CPU, on the addresses of any array.
Digests are those of the encoded segments, by `xxh3_device.digest_spans`.
"""

import functools
import math
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvengine.kernels import copy, lossless, rows
from kvengine.kernels.build import REGISTERS_MAX, Variant
from kvengine.kernels.copy import OVERFULL, Int64s, Span
from kvengine.kernels.device import Ids
from kvengine.kernels.launch import Launcher, expect_memory, launcher
from kvengine.kernels.rows import Rows

_COLUMNS = tl.constexpr(rows.COLUMNS)
_BASE = tl.constexpr(rows.BASE)
_GROUP = tl.constexpr(rows.GROUP)
_TOKEN_CACHE = tl.constexpr(rows.TOKEN_CACHE)
_HEAD_CACHE = tl.constexpr(rows.HEAD_CACHE)
_DIM = tl.constexpr(rows.DIM)

# columns of the table of jobs: a tile of a component, for every block
COMPONENT, SEGMENT, TOKEN, TOKENS, CHANNEL, CHANNELS, AT, SIZE = range(8)
_JOB = tl.constexpr(8)
_COMPONENT, _SEGMENT = tl.constexpr(COMPONENT), tl.constexpr(SEGMENT)
_TOKEN, _TOKENS = tl.constexpr(TOKEN), tl.constexpr(TOKENS)
_CHANNEL, _CHANNELS = tl.constexpr(CHANNEL), tl.constexpr(CHANNELS)
_AT, _SIZE = tl.constexpr(AT), tl.constexpr(SIZE)

# 64 elements a thread take 33 instructions each for sm_90, 32 take 45; the decoder needs too many
# registers for that, and gains little.
ENCODE_WARPS, DECODE_WARPS = 4, 8
BLOCKS_MAX = 65535  # of a launch: a grid's second axis is no longer

_OVERFULL = tl.constexpr(OVERFULL)
_LOST = tl.constexpr(-(1 << 63))  # as in device.py: the offset of an id that is out of range


@triton.jit
def _cache(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,
    offsets_ptr,
    job,
    n,
    count_blocks,
    count_units,
    first_head,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where the tile's pairs lie in the cache, [TOKENS, GROUPS, 4]; which there are, and known."""
    row = components_ptr + tl.load(job + _COMPONENT) * _COLUMNS
    token = tl.arange(0, TOKENS)
    group = tl.arange(0, GROUPS)
    inside = token < tl.load(job + _TOKENS).to(tl.int32)
    token += tl.load(job + _TOKEN).to(tl.int32)
    unit = tl.where(count_units > 1, token, 0)
    units = (tl.load(row + _GROUP) * count_blocks + n) * count_units
    offset = tl.load(offsets_ptr + units + unit, mask=inside, other=0)
    known = inside & (offset != _LOST)
    start = tl.load(row + _BASE) + offset + token * tl.load(row + _TOKEN_CACHE)
    channel = tl.load(job + _CHANNEL).to(tl.int32) + 8 * group
    dim = tl.load(row + _DIM).to(tl.int32)
    channel -= first_head * dim
    place = (channel // dim) * tl.load(row + _HEAD_CACHE) + 2 * (channel % dim)
    address = start[:, None, None] + place[None, :, None]
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    pointer = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), [ALIGN, ALIGN, ALIGN])
    pointer += tl.arange(0, 4)[None, None, :]
    columns = (8 * group < tl.load(job + _CHANNELS).to(tl.int32))[None, :]
    return pointer, inside[:, None] & columns, known[:, None] & columns


@triton.jit
def _frame(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    frames_ptr, job, n, GROUPS: tl.constexpr, TOKENS: tl.constexpr, ALIGN: tl.constexpr
):
    """Where the tile's planes begin, the place of each group of codes, and the escapes' room."""
    HALF: tl.constexpr = ALIGN // 2 if ALIGN > 1 else 1
    address = tl.load(frames_ptr + n) + tl.load(job + _AT)
    groups = tl.multiple_of(tl.load(job + _CHANNELS).to(tl.int32) // 8, HALF)
    count = tl.load(job + _TOKENS).to(tl.int32) * groups
    mantissas = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), 16)
    low = tl.multiple_of((address + 8 * count).to(tl.pointer_type(tl.uint16)), ALIGN)
    high = tl.multiple_of((address + 10 * count).to(tl.pointer_type(tl.uint8)), ALIGN)
    tops = tl.multiple_of((address + 11 * count).to(tl.pointer_type(tl.uint16)), ALIGN)
    escapes = (address + 11 * count + 8 * groups).to(tl.pointer_type(tl.uint8))
    room = tl.load(job + _SIZE).to(tl.int32) - 11 * count - 8 * groups
    place = tl.arange(0, TOKENS)[:, None] * groups + tl.arange(0, GROUPS)[None, :]
    return mantissas, low, high, tops, escapes, place, room


@triton.jit
def _four(pairs, TOKENS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take [TOKENS, GROUPS, 4] apart, by the last axis: a thread has all four."""
    even, odd = pairs.reshape(TOKENS, GROUPS, 2, 2).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@triton.jit
def _pairs(packed):
    """Sum up the escapes of the pairs before each, and in the highest 6 of 30 bits those of all.

    packed: uint32, codes of 8 elements, 3 bits each.
    """
    escape = packed & (packed >> 1) & (packed >> 2) & 0x249249
    return (((escape & 0x041041) + ((escape >> 3) & 0x041041)) * 0x041041) << 6


@triton.jit
def _before(packed, TOKENS: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Count the escapes before each group of 8 elements, and all of them."""
    flat = ((_pairs(packed) >> 24) & 63).to(tl.int32).reshape(TOKENS * GROUPS)
    return (tl.cumsum(flat, 0) - flat).reshape(TOKENS, GROUPS), tl.sum(flat, 0)


@triton.jit
def encode_tiles_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,  # int64[C, 8]
    offsets_ptr,  # int64[G, N, U]
    frames_ptr,  # int64[N]
    jobs_ptr,  # int64[J, 8]
    verdicts_ptr,  # uint8[N, S], GOOD already
    first_block,
    count_blocks,  # N
    count_units,  # U
    count_segments,  # S
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,  # of 8 channels
    ROOM: tl.constexpr,  # more than any tile's for escapes
    ALIGN: tl.constexpr,  # bytes that divide every address in the cache
    PLANES: tl.constexpr,  # bytes that divide every plane's
):
    job = jobs_ptr + tl.program_id(0).to(tl.int64) * _JOB
    n = first_block + tl.program_id(1).to(tl.int64)
    pointer, inside, known = _cache(
        components_ptr, offsets_ptr, job, n, count_blocks, count_units, 0, TOKENS, GROUPS, ALIGN
    )
    mantissas, low, high, tops, escapes, place, room = _frame(
        frames_ptr, job, n, GROUPS, TOKENS, PLANES
    )
    word = tl.load(pointer, mask=known[:, :, None], other=0)  # [TOKENS, GROUPS, 4]
    # the largest exponents, two a word: [GROUPS, 4]
    top = tl.max(word & 0x7F80, 0) >> 7
    top |= tl.max(word & 0x7F800000, 0) >> 7
    columns = 8 * tl.arange(0, GROUPS) < tl.load(job + _CHANNELS).to(tl.int32)
    tl.store(
        tops + 4 * tl.arange(0, GROUPS)[:, None] + tl.arange(0, 4)[None, :],
        (top | (top >> 8)).to(tl.uint16),
        mask=columns[:, None],
    )
    mantissa = (word & 0x007F007F) | ((word >> 8) & 0x00800080)
    mantissa = (mantissa | (mantissa >> 8)).to(tl.uint16)
    pair = tl.arange(0, 4)[None, None, :]
    tl.store(mantissas + 4 * place[:, :, None] + pair, mantissa, mask=inside[:, :, None])

    exponent = (word >> 7) & 0x00FF00FF
    below = top[None, :, :] - exponent
    escape = ((below + 0x00F900F9) >> 8) & 0x00010001  # below > 6
    code = (below | (escape * 7)) & 0x00070007
    code = _four((code | (code >> 13)) & 0x3F, TOKENS, GROUPS)
    packed = code[0] | (code[1] << 6) | (code[2] << 12) | (code[3] << 18)  # [TOKENS, GROUPS]
    tl.store(low + place, packed.to(tl.uint16), mask=inside)
    tl.store(high + place, (packed >> 16).to(tl.uint8), mask=inside)

    packed = tl.where(inside, packed, 0)
    at, total = _before(packed, TOKENS, GROUPS)
    exponent = _four(exponent, TOKENS, GROUPS)
    for j in tl.static_range(4):
        for half in tl.static_range(2):
            far = ((packed >> (6 * j + 3 * half)) & 7) == 7
            value = (exponent[j] >> (16 * half)).to(tl.uint8)
            tl.store(escapes + at, value, mask=far & (at < room))
            at += far.to(tl.int32)
    rest = tl.arange(0, ROOM)
    tl.store(escapes + rest, tl.zeros([ROOM], tl.uint8), mask=(rest >= total) & (rest < room))
    verdict = verdicts_ptr + n * count_segments + tl.load(job + _SEGMENT)
    tl.store(verdict, tl.full([], _OVERFULL, tl.uint8), mask=total > room)


@triton.jit
def decode_tiles_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,  # int64[C, 8]
    offsets_ptr,  # int64[G, N, U]
    frames_ptr,  # int64[N]
    jobs_ptr,  # int64[J, 8]
    first_block,
    count_blocks,  # N
    count_units,  # U
    first_head,
    last_head,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,  # of 8 channels
    ROOM: tl.constexpr,  # more than any tile's for escapes
    ALIGN: tl.constexpr,  # bytes that divide every address in the cache
    PLANES: tl.constexpr,  # bytes that divide every plane's
):
    job = jobs_ptr + tl.program_id(0).to(tl.int64) * _JOB
    n = first_block + tl.program_id(1).to(tl.int64)
    pointer, inside, known = _cache(
        components_ptr,
        offsets_ptr,
        job,
        n,
        count_blocks,
        count_units,
        first_head,
        TOKENS,
        GROUPS,
        ALIGN,
    )
    dim = tl.load(components_ptr + tl.load(job + _COMPONENT) * _COLUMNS + _DIM).to(tl.int32)
    channel = tl.load(job + _CHANNEL).to(tl.int32) + 8 * tl.arange(0, GROUPS)
    known &= ((channel >= first_head * dim) & (channel < last_head * dim))[None, :]
    mantissas, low, high, tops, escapes, place, room = _frame(
        frames_ptr, job, n, GROUPS, TOKENS, PLANES
    )
    pair = tl.arange(0, 4)[None, None, :]
    packed = tl.load(low + place, mask=inside, other=0).to(tl.uint32)
    packed |= tl.load(high + place, mask=inside, other=0).to(tl.uint32) << 16
    code = (packed[:, :, None] >> (6 * pair).to(tl.uint32)) & 0x3F
    code = (code | (code << 13)) & 0x00070007  # [TOKENS, GROUPS, 4], two a word
    escape = ((code + 0x00010001) >> 3) & 0x00010001
    before, _ = _before(packed, TOKENS, GROUPS)
    within = (_pairs(packed)[:, :, None] >> (6 * pair).to(tl.uint32)) & 63
    at = before[:, :, None] + within.to(tl.int32)
    # bytes that no coder has written may name more escapes than there is room for: those are zeros
    listed = tl.load(escapes + tl.arange(0, ROOM), mask=tl.arange(0, ROOM) < room, other=0)
    PAIRS: tl.constexpr = TOKENS * GROUPS * 4
    far = tl.gather(listed, tl.minimum(at, ROOM - 1).reshape(PAIRS), 0).to(tl.uint32)
    far = tl.where((escape & 1) != 0, far.reshape(TOKENS, GROUPS, 4), 0)
    at += (escape & 1).to(tl.int32)
    more = tl.gather(listed, tl.minimum(at, ROOM - 1).reshape(PAIRS), 0).to(tl.uint32)
    far |= tl.where((escape >> 16) != 0, more.reshape(TOKENS, GROUPS, 4) << 16, 0)

    columns = 8 * tl.arange(0, GROUPS) < tl.load(job + _CHANNELS).to(tl.int32)
    top = tl.load(
        tops + 4 * tl.arange(0, GROUPS)[:, None] + tl.arange(0, 4)[None, :],
        mask=columns[:, None],
        other=0,
    ).to(tl.uint32)
    top = (top & 0xFF) | ((top & 0xFF00) << 8) | 0x01000100  # what a lower half may borrow
    exponent = ((top[None, :, :] - code) & 0x00FF00FF & ~(escape * 0xFF)) | far
    word = tl.load(mantissas + 4 * place[:, :, None] + pair, mask=inside[:, :, None], other=0).to(
        tl.uint32
    )
    word = (word | (word << 8)) & 0x00FF00FF
    word = (word & 0x007F007F) | ((word & 0x00800080) << 8) | (exponent << 7)
    tl.store(pointer, word, mask=known[:, :, None])


def encode(
    table: Rows,
    blocks: Span,
    segments: Span,
    verdicts: Any,
    device: str | Launcher,
    ids: Ids | None = None,
) -> None:
    """Code cache -> frames in the device's current stream, without digests.

    One launch, or one for each BLOCKS_MAX blocks.

    verdicts: uint8[N, S], device memory that holds GOOD: that of a segment without room for its
    escapes becomes OVERFULL, its status word, to be read when the stream has passed the launch.
    Every address of `table` is one that the device can reach, and stays so until then. Ranges as in
    `lossless.encode`. `device` is torch's name of it, or a Launcher; with `ids` they stand in for
    the offsets of `table`, of which only the shape counts. Raises ValueError for addresses in the
    cache that are no multiple of 4 bytes.
    """
    _launch(table, blocks, segments, verdicts, device, ids)


def decode(
    table: Rows, blocks: Span, segments: Span, device: str | Launcher, ids: Ids | None = None
) -> None:
    """Decode frames -> cache, of segments that are verified already; otherwise as `encode`."""
    _launch(table, blocks, segments, None, device, ids)


def jobs_of(table: Rows, segments: Span) -> tuple[Int64s, dict[str, int]]:
    """List the tiles of these segments, int64[J, 8], and choose the constants that fit them all.

    Those without a channel of the table's heads are left out. Both are kept for the next launch.
    """
    components = table.components[:, [rows.HEADS, rows.DIM, rows.FRAME]]
    chosen = table.segments[slice(*segments), :2]
    return _jobs(table.tokens, components.tobytes(), chosen.tobytes(), segments[0], table.heads)


@functools.lru_cache(64)
def _jobs(
    tokens: int, components: bytes, segments: bytes, first_segment: int, chosen: Span
) -> tuple[Int64s, dict[str, int]]:
    shapes = np.frombuffer(components, np.int64).reshape(-1, 3).tolist()
    found = []
    for s, (first, count) in enumerate(np.frombuffer(segments, np.int64).reshape(-1, 2).tolist()):
        for c in range(first, first + count):
            heads, dim, frame = shapes[c]
            if dim % lossless.GROUP:
                raise ValueError(
                    f"heads of {dim} elements, expected a multiple of {lossless.GROUP}"
                )
            tiles = lossless.tiles(tokens, heads * dim)
            start = tiles[:, lossless.CHANNEL]
            end = start + tiles[:, lossless.CHANNELS]
            tiles = tiles[(start < chosen[1] * dim) & (end > chosen[0] * dim)]
            tiles[:, lossless.AT] += frame
            place = np.full((len(tiles), 2), (c, first_segment + s), np.int64)
            found.append(np.concatenate((place, tiles), axis=1))
    jobs = np.concatenate(found)
    jobs.flags.writeable = False
    return jobs, _constants(jobs)


def _launch(
    table: Rows,
    blocks: Span,
    segments: Span,
    verdicts: Any,
    device: str | Launcher,
    ids: Ids | None,
) -> None:
    lossless.expect_bf16(table)
    copy.expect_ranges(table, blocks, segments)
    if verdicts is not None:
        table.expect_whole()
    align = table.alignment(table.components, table.offsets if ids is None else ids.strides)
    if align % 4:
        raise ValueError(
            f"addresses in the cache are multiples of {align} bytes, expected of 4: copy it to an "
            "aligned array"
        )
    if blocks[0] == blocks[1] or segments[0] == segments[1]:
        return
    on = launcher(device)
    jobs, constants = jobs_of(table, segments)
    _, count_blocks, count_units = table.offsets.shape
    offsets = on.table(table.offsets) if ids is None else ids.offsets(table, on)
    tables = [on.table(table.components), offsets, on.table(table.frames), on.table(jobs)]
    last_head = min(table.heads[1], int(table.components[:, rows.HEADS].max()))
    counts = [count_blocks, count_units, table.heads[0], last_head]
    kernel, num_warps = decode_tiles_kernel, DECODE_WARPS
    if verdicts is not None:
        expect_memory("verdicts", verdicts, 1, len(table.frames) * len(table.segments))
        tables.append(verdicts)
        counts[2:] = [len(table.segments)]
        kernel, num_warps = encode_tiles_kernel, ENCODE_WARPS
    constants = constants | {"ALIGN": align}
    for first in range(blocks[0], blocks[1], BLOCKS_MAX):
        grid = (len(jobs), min(BLOCKS_MAX, blocks[1] - first))
        on.run(kernel, grid, (*tables, first, *counts), constants, num_warps=num_warps)


def _constants(jobs: Int64s) -> dict[str, int]:
    tokens, channels = jobs[:, TOKENS], jobs[:, CHANNELS]
    groups = channels // lossless.GROUP
    planes = math.gcd(16, 2 * int(np.gcd.reduce(groups)), int(np.gcd.reduce(tokens * groups)))
    columns = jobs[:, [TOKENS, CHANNELS, SIZE]].tolist()
    room = max(size - lossless.escapes_at(t * c, c) for t, c, size in columns)
    return {
        "TOKENS": triton.next_power_of_2(int(tokens.max())),
        "GROUPS": triton.next_power_of_2(int(groups.max())),
        "ROOM": triton.next_power_of_2(room + 1),
        "PLANES": planes,
    }


def _variant(encodes: bool, tokens: int, align: int) -> Variant:
    pointers = ["components_ptr", "offsets_ptr", "frames_ptr", "jobs_ptr"]
    counts = ["first_block", "count_blocks", "count_units"]
    groups = lossless.ELEMENTS // tokens // lossless.GROUP
    constants = {"TOKENS": tokens, "GROUPS": groups, "ROOM": 1024, "PLANES": align, "ALIGN": align}
    signature = dict.fromkeys(pointers, "*i64") | dict.fromkeys(counts, "i32")
    if encodes:
        signature |= {"verdicts_ptr": "*u8", "count_segments": "i32"}
    else:
        signature |= {"first_head": "i32", "last_head": "i32"}
    return Variant(
        f"lossless {'encode' if encodes else 'decode'} {tokens} tokens by {align} bytes",
        encode_tiles_kernel if encodes else decode_tiles_kernel,
        signature=signature,
        constants=constants,
        aligned=tuple(pointers),
        num_warps=ENCODE_WARPS if encodes else DECODE_WARPS,
        elements=lossless.ELEMENTS,
        load_bits=8 * align if encodes else min(8 * align, 64),  # the frame's widest plane
        store_bits=min(8 * align, 64) if encodes else 8 * align,
        # 16 warps on a multiprocessor, where accesses are wide
        registers_max=128 if align == 16 else REGISTERS_MAX,
    )


# Blocks of 64 and 16 tokens of any model; then the narrowest addresses.
VARIANTS = tuple(
    _variant(encodes, tokens, align)
    for encodes in (True, False)
    for tokens, align in ((64, 16), (16, 16), (16, 4))
)
