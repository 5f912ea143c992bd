"""The device path of `quant`: gather, encode and pack in one kernel, and its inverse, all layers.

Imports triton, so it is imported on use only. With TRITON_INTERPRET=1 set before that,
the kernels run on the CPU, on the addresses of any array. Digests are not computed here. A launch
takes all components of one shape: every layer, K and V (int8 and int4 have a launch for keys and
one for values). Elements are read as integer words and rounded by integers, so that codes are those
of the reference on every target: e4m3 needs no instruction of its own, and no target is refused.

A value x is scaled and clamped to a small range before 1.5 * 2**23 is added: the nearest integer,
ties to even, stands in the low bits of the sum.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from kvengine.kernels import quant, rows
from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Span
from kvengine.kernels.device import Ids
from kvengine.kernels.launch import Launcher, launcher
from kvengine.kernels.rows import Rows

TILE = 8192  # elements of a program: 64 a thread of 4 warps; more of them spill
WIDTH_MAX = 64  # channels of each half of a row that a program of int4 keys takes
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_COLUMNS = tl.constexpr(rows.COLUMNS)
_BASE = tl.constexpr(rows.BASE)
_GROUP = tl.constexpr(rows.GROUP)
_TOKEN_CACHE = tl.constexpr(rows.TOKEN_CACHE)
_HEAD_CACHE = tl.constexpr(rows.HEAD_CACHE)
_HEADS = tl.constexpr(rows.HEADS)
_FRAME = tl.constexpr(rows.FRAME)
_CHUNK = tl.constexpr(quant.CHUNK_TOKENS)

_BF16, _F16, _F32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ABSOLUTE = tl.constexpr(0x7FFF_FFFF)
_INFINITY = tl.constexpr(quant.INFINITY)
_LOST = tl.constexpr(-(1 << 63))  # as in device.py: the offset of an id that is out of range
_SPREAD_MAX = tl.constexpr(quant.SPREAD_MAX)
_BF16_NAN = tl.constexpr(quant.BF16_NAN)
_NORMAL_MIN = tl.constexpr(float(quant.NORMAL_MIN))
_MAGIC = tl.constexpr(12582912.0)
_LENGTH_MIN = tl.constexpr(quant.LENGTH_MIN)
_EDGES = tuple(tl.constexpr(edge) for edge in quant.EDGES)
_EDGE_0, _EDGE_1, _EDGE_2, _EDGE_3, _EDGE_4, _EDGE_5, _EDGE_6 = _EDGES
_LEVEL_1 = tl.constexpr(quant.LEVEL_1)
_LEVEL_3 = tl.constexpr(quant.LEVEL_3)
_LEVEL_5 = tl.constexpr(quant.LEVEL_5)


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _near_bf16(value):
    """Round finite single precision to bf16, ties to even: its 16 bits, as int32."""
    bits = _bits(value)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF


@triton.jit
def _load(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    address, col, mask, KIND: tl.constexpr, ALIGN: tl.constexpr
):
    """Read [ROWS, COLS] elements as single precision. address: int64[ROWS]."""
    word: tl.constexpr = tl.uint32 if KIND == _F32 else tl.uint16
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    start = tl.multiple_of(address[:, None].to(tl.pointer_type(word)), [ALIGN, ALIGN])
    words = tl.load(start + col[None, :], mask=mask, other=0)
    if KIND == _BF16:
        value = _float(words.to(tl.int32) << 16)
    elif KIND == _F16:
        value = words.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = words.to(tl.float32, bitcast=True)
    return value


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    address, col, value, bad, mask, KIND: tl.constexpr, ALIGN: tl.constexpr
):
    """Write [ROWS, COLS] finite values, and NaN where `bad`. address: int64[ROWS]."""
    if KIND == _BF16:
        words = (_near_bf16(value) | tl.where(bad, _BF16_NAN, 0)).to(tl.uint16)
    elif KIND == _F16:
        words = value.to(tl.float16).to(tl.uint16, bitcast=True)
        words = words | tl.where(bad, 0x7E00, 0).to(tl.uint16)
    else:
        words = (_bits(value) | tl.where(bad, 0x7FC0_0000, 0)).to(tl.uint32)
    word: tl.constexpr = tl.uint32 if KIND == _F32 else tl.uint16
    start = tl.multiple_of(address[:, None].to(tl.pointer_type(word)), [ALIGN, ALIGN])
    tl.store(start + col[None, :], words, mask=mask)


@triton.jit
def _job(components_ptr, first_block, tiles):
    """Give what a program works on: block, tile of a component, the component's row."""
    n = (first_block + tl.program_id(0) // tiles).to(tl.int64)
    row = components_ptr + tl.program_id(1).to(tl.int64) * _COLUMNS
    return n, tl.program_id(0) % tiles, row


@triton.jit
def _chunk(tile, tokens, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Give a tile's head of those that the cache has, its chunk, and the chunks of a head."""
    chunks = (tokens + _CHUNK - 1) // _CHUNK
    return (tile // (chunks * PARTS)).to(tl.int64), tile // PARTS % chunks, chunks


@triton.jit
def _addresses(row, offsets_ptr, n, t, h, live, count_blocks, count_units):
    """Give the addresses in the cache of the rows of tokens t and heads h of block n.

    And which are known: live, and of no id that is out of range.
    """
    u = tl.where(count_units > 1, t, 0)
    place = (tl.load(row + _GROUP) * count_blocks + n) * count_units + u
    offset = tl.load(offsets_ptr + place, mask=live, other=0)
    cache = tl.load(row + _BASE) + offset
    cache += t * tl.load(row + _TOKEN_CACHE) + h * tl.load(row + _HEAD_CACHE)
    return cache, live & (offset != _LOST)


@triton.jit
def _bytes_at(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _pad(plane, nbytes, tile):
    """Write the zeros that fill a plane up to 16 bytes, in the first program of a component."""
    at = tl.arange(0, 16)
    count = tl.where(tile == 0, (16 - nbytes % 16) % 16, 0)
    start = plane.to(tl.pointer_type(tl.uint8)) + nbytes
    tl.store(start + at, tl.zeros([16], tl.uint8), mask=at < count)


@triton.jit
def _padded(nbytes):
    return (nbytes + 15) // 16 * 16


@triton.jit
def _store_halves(plane, index, words, mask):
    start = tl.multiple_of(plane.to(tl.pointer_type(tl.uint16)), 16)
    tl.store(start + index, words.to(tl.uint16), mask=mask)


@triton.jit
def _scales(plane, index, mask):
    """Read bf16 scales: their values, 0 for NaN, and which are NaN."""
    start = tl.multiple_of(plane.to(tl.pointer_type(tl.uint16)), 16)
    words = tl.load(start + index, mask=mask, other=0).to(tl.int32)
    bad = (words & 0x7F80) == 0x7F80
    return _float(tl.where(bad, 0, words) << 16), bad


@triton.jit
def _inverse(scale):
    """Divide 1 by a scale, to 13 bits, so that an approximate division will do; 0 for 0."""
    live = scale > 0
    bits = _bits(1.0 / tl.where(live, scale, 1.0))
    return _float(tl.where(live, (bits + 0x400) & -0x800, 0))


@triton.jit
def _near_e4m3(step):
    """Round to e4m3, ties to even: its 8 bits, as int32. step: at most 448 either way."""
    bits = _bits(step)
    absolute = bits & _ABSOLUTE
    normal = ((absolute + 0x7_FFFF + ((absolute >> 20) & 1)) >> 20) - 960  # 8 * (127 - 7)
    small = _bits(_float(absolute) * 512.0 + _MAGIC) & 0xFF  # below 2**-6 there is one step
    return tl.where(absolute < 0x3C80_0000, small, normal) | (bits >> 24 & 0x80)


@triton.jit
def _scale(most, MOST: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Give the scales of what has a largest magnitude of these bits, and which are not finite."""
    bad = most >= _INFINITY  # bits of positive numbers order as they do
    scale = _float(_near_bf16(_float(tl.where(bad, 0, most)) * (1.0 / MOST)) << 16)
    scale = tl.minimum(scale, CAP)
    return tl.where(scale < _NORMAL_MIN, 0.0, scale), bad


@triton.jit
def encode_rows_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,  # int64[C, 8]
    offsets_ptr,  # int64[G, N, U]
    frames_ptr,  # int64[N]
    first_block,
    count_blocks,  # N
    count_units,  # U
    tokens,
    tiles,  # programs of a component of a block
    MOST: tl.constexpr,  # 127 for int8, 448 for e4m3
    CAP: tl.constexpr,  # the largest scale
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,  # bytes that divide every address of a row
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # a power of two, at least DIM
):
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens
    r = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]: head by head, token by token
    col = tl.arange(0, COLS)
    live = r < count
    mask = live[:, None] & (col < DIM)[None, :]
    address, known = _addresses(
        row, offsets_ptr, n, r % tokens, r // tokens, live, count_blocks, count_units
    )
    x = _load(address, col, known[:, None] & (col < DIM)[None, :], KIND, CACHE_ALIGN)

    scale, bad = _scale(tl.max(_bits(x) & _ABSOLUTE, 1), MOST, CAP)
    step = tl.where(bad[:, None], 0.0, x) * _inverse(scale)[:, None]
    step = tl.minimum(tl.maximum(step, -MOST), MOST)
    code = _near_e4m3(step) if MOST == 448.0 else _bits(step + _MAGIC)

    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    tl.store(codes + (r.to(tl.int64) * DIM)[:, None] + col[None, :], code.to(tl.uint8), mask=mask)
    scales = codes + _padded(count.to(tl.int64) * DIM)
    _store_halves(scales, r, tl.where(bad, _BF16_NAN, _bits(scale) >> 16), live)
    _pad(codes, count.to(tl.int64) * DIM, tile)
    _pad(scales, count * 2, tile)


@triton.jit
def decode_rows_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    first_head,
    heads,  # that the cache has
    MOST: tl.constexpr,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens
    r = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    live = r < heads * tokens
    at = first_head * tokens + r  # in the frame
    mask = live[:, None] & (col < DIM)[None, :]
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    code = tl.load(codes + (at.to(tl.int64) * DIM)[:, None] + col[None, :], mask=mask, other=0)
    scale, bad = _scales(codes + _padded(count.to(tl.int64) * DIM), at, live)
    if MOST == 448.0:
        wide = code.to(tl.int32)
        step = _float((wide & 0x7F) << 20) * 1.329227995784916e36  # 2**120
        step = _float(_bits(step) | (wide & 0x80) << 24)
    else:
        step = code.to(tl.int8, bitcast=True).to(tl.float32)
    address, known = _addresses(
        row, offsets_ptr, n, r % tokens, r // tokens, live, count_blocks, count_units
    )
    mask = known[:, None] & (col < DIM)[None, :]
    _store(address, col, step * scale[:, None], bad[:, None], mask, KIND, CACHE_ALIGN)


@triton.jit
def encode_columns_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of a chunk, a power of two
    COLS: tl.constexpr,  # channels of a program
):
    PARTS: tl.constexpr = (DIM + COLS - 1) // COLS
    n, tile, row = _job(components_ptr, first_block, tiles)
    h, chunk, chunks = _chunk(tile, tokens, PARTS)
    t = (chunk * _CHUNK + tl.arange(0, ROWS)).to(tl.int64)
    col = tile % PARTS * COLS + tl.arange(0, COLS)
    live = t < tokens
    address, known = _addresses(row, offsets_ptr, n, t, h, live, count_blocks, count_units)
    x = _load(address, col, known[:, None] & (col < DIM)[None, :], KIND, CACHE_ALIGN)

    scale, bad = _scale(tl.max(_bits(x) & _ABSOLUTE, 0), 127.0, CAP)
    step = tl.where(bad[None, :], 0.0, x) * _inverse(scale)[None, :]
    code = _bits(tl.minimum(tl.maximum(step, -127.0), 127.0) + _MAGIC)

    heads = tl.load(row + _HEADS)
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    place = ((h * tokens + t) * DIM)[:, None] + col[None, :]
    tl.store(codes + place, code.to(tl.uint8), mask=live[:, None] & (col < DIM)[None, :])
    scales = codes + _padded(heads * tokens * DIM)
    words = tl.where(bad, _BF16_NAN, _bits(scale) >> 16)
    _store_halves(scales, (h * chunks + chunk) * DIM + col, words, col < DIM)
    _pad(codes, heads * tokens * DIM, tile)
    _pad(scales, heads * chunks * DIM * 2, tile)


@triton.jit
def decode_columns_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    first_head,
    heads,  # that the cache has
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    PARTS: tl.constexpr = (DIM + COLS - 1) // COLS
    n, tile, row = _job(components_ptr, first_block, tiles)
    h, chunk, chunks = _chunk(tile, tokens, PARTS)
    head = first_head + h  # in the frame
    t = (chunk * _CHUNK + tl.arange(0, ROWS)).to(tl.int64)
    col = tile % PARTS * COLS + tl.arange(0, COLS)
    live = t < tokens
    mask = live[:, None] & (col < DIM)[None, :]
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    code = tl.load(codes + ((head * tokens + t) * DIM)[:, None] + col[None, :], mask=mask, other=0)
    scales = codes + _padded(tl.load(row + _HEADS) * tokens * DIM)
    scale, bad = _scales(scales, (head * chunks + chunk) * DIM + col, col < DIM)
    step = code.to(tl.int8, bitcast=True).to(tl.float32)
    address, known = _addresses(row, offsets_ptr, n, t, h, live, count_blocks, count_units)
    mask = known[:, None] & (col < DIM)[None, :]
    _store(address, col, step * scale[None, :], bad[None, :], mask, KIND, CACHE_ALIGN)


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _lowest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reduce to the lowest value, NaN where there is one."""
    if _INTERPRETED:  # which takes long over functions of ours, and drops NaN in its own
        found = tl.where(tl.max((x != x).to(tl.int32), axis) > 0, float("nan"), tl.min(x, axis))
    else:
        found = tl.reduce(x, axis, _lower)
    return found


@triton.jit
def _highest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    if _INTERPRETED:
        found = tl.where(tl.max((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))
    else:
        found = tl.reduce(x, axis, _higher)
    return found


@triton.jit
def _spread(lowest, highest, LEAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Give low and scale of groups, and which are not finite: there both are 0."""
    bits = _bits(lowest + 0.0)  # no zero has a sign
    low = _float((bits + ((bits >> 31) & 0xFFFF)) & -0x1_0000)  # down to bf16
    low = tl.maximum(low, LEAST)
    # two products, or the difference would overflow first
    scale = _bits(highest * (1.0 / 15.0) - low * (1.0 / 15.0)) & 0x7FFF_0000
    bad = (scale > _SPREAD_MAX) | ((bits & _ABSOLUTE) >= _INFINITY)
    scale = tl.where(bad | (scale < 0x0080_0000), 0, scale)  # below the normal numbers
    return tl.where(bad, 0.0, low), _float(scale), bad


@triton.jit
def _pair(low, scale, bad):
    lows = tl.where(bad, _BF16_NAN, _bits(low) >> 16)
    return ((_bits(scale) >> 16) | lows << 16).to(tl.uint32, bitcast=True)


@triton.jit
def _nibble(x, low, inverse):
    """Give codes of 0 to 15; 0 where the inverse is 0, whatever x is: a maximum drops NaN."""
    step = tl.minimum(tl.maximum((x - low) * inverse, 0.0), 15.0)
    return _bits(step + _MAGIC) & 15


@triton.jit
def _store_words(plane, index, words, mask):
    start = tl.multiple_of(plane.to(tl.pointer_type(tl.uint32)), 16)
    tl.store(start + index, words, mask=mask)


@triton.jit
def _pairs(plane, index, mask):
    """Read low and scale, zeros where they are not finite, and which are not."""
    start = tl.multiple_of(plane.to(tl.pointer_type(tl.uint32)), 16)
    pair = tl.load(start + index, mask=mask, other=0).to(tl.int32, bitcast=True)
    bad = ((pair >> 16) & 0x7F80) == 0x7F80
    pair = tl.where(bad, 0, pair)
    return _float(pair & -0x1_0000), _float(pair << 16), bad


@triton.jit
def encode_channels_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    LEAST: tl.constexpr,  # what low may be
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of a chunk, a power of two
    COLS: tl.constexpr,  # channels of each half of a row
):
    HALF: tl.constexpr = DIM // 2
    PARTS: tl.constexpr = (HALF + COLS - 1) // COLS
    n, tile, row = _job(components_ptr, first_block, tiles)
    h, chunk, chunks = _chunk(tile, tokens, PARTS)
    t = chunk * _CHUNK + tl.arange(0, ROWS)
    col = tile % PARTS * COLS + tl.arange(0, COLS)
    live = t < tokens
    mask = live[:, None] & (col < HALF)[None, :]
    # rows past the end are the last one again: no extreme changes
    inside = tl.minimum(t, tokens - 1).to(tl.int64)
    address, known = _addresses(
        row, offsets_ptr, n, inside, h, inside >= 0, count_blocks, count_units
    )
    lower = _load(address, col, known[:, None] & (col < HALF)[None, :], KIND, CACHE_ALIGN)
    upper = _load(address, HALF + col, known[:, None] & (col < HALF)[None, :], KIND, CACHE_ALIGN)

    low_0, scale_0, bad_0 = _spread(_lowest(lower, 0), _highest(lower, 0), LEAST)
    low_1, scale_1, bad_1 = _spread(_lowest(upper, 0), _highest(upper, 0), LEAST)
    code = _nibble(lower, low_0[None, :], _inverse(scale_0)[None, :])
    code = code | (_nibble(upper, low_1[None, :], _inverse(scale_1)[None, :]) << 4)

    heads = tl.load(row + _HEADS)
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    place = ((h * tokens + t.to(tl.int64)) * HALF)[:, None] + col[None, :]
    tl.store(codes + place, code.to(tl.uint8), mask=mask)
    pairs = codes + _padded(heads * tokens * HALF)
    at = (h * chunks + chunk) * DIM + col
    _store_words(pairs, at, _pair(low_0, scale_0, bad_0), col < HALF)
    _store_words(pairs, at + HALF, _pair(low_1, scale_1, bad_1), col < HALF)
    _pad(codes, heads * tokens * HALF, tile)
    _pad(pairs, heads * chunks * DIM * 4, tile)


@triton.jit
def decode_channels_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    first_head,
    heads,  # that the cache has
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    PARTS: tl.constexpr = (HALF + COLS - 1) // COLS
    n, tile, row = _job(components_ptr, first_block, tiles)
    h, chunk, chunks = _chunk(tile, tokens, PARTS)
    head = first_head + h  # in the frame
    t = (chunk * _CHUNK + tl.arange(0, ROWS)).to(tl.int64)
    col = tile % PARTS * COLS + tl.arange(0, COLS)
    live = t < tokens
    mask = live[:, None] & (col < HALF)[None, :]
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    place = ((head * tokens + t) * HALF)[:, None] + col[None, :]
    code = tl.load(codes + place, mask=mask, other=0).to(tl.int32)
    pairs = codes + _padded(tl.load(row + _HEADS) * tokens * HALF)
    at = (head * chunks + chunk) * DIM + col
    low_0, scale_0, bad_0 = _pairs(pairs, at, col < HALF)
    low_1, scale_1, bad_1 = _pairs(pairs, at + HALF, col < HALF)
    lower = (code & 15).to(tl.float32) * scale_0[None, :] + low_0[None, :]
    upper = (code >> 4).to(tl.float32) * scale_1[None, :] + low_1[None, :]
    address, known = _addresses(row, offsets_ptr, n, t, h, live, count_blocks, count_units)
    mask = known[:, None] & (col < HALF)[None, :]
    _store(address, col, lower, bad_0[None, :], mask, KIND, CACHE_ALIGN)
    _store(address, HALF + col, upper, bad_1[None, :], mask, KIND, CACHE_ALIGN)


@triton.jit
def encode_groups_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    LEAST: tl.constexpr,  # what low may be
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,  # of a row: 1 or 2
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # a power of two, at least half of DIM
):
    HALF: tl.constexpr = DIM // 2
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens
    r = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    live = r < count
    inside = (col < HALF)[None, :]
    mask = live[:, None] & inside
    address, known = _addresses(
        row, offsets_ptr, n, r % tokens, r // tokens, live, count_blocks, count_units
    )
    lower = _load(address, col, known[:, None] & inside, KIND, CACHE_ALIGN)
    upper = _load(address, HALF + col, known[:, None] & inside, KIND, CACHE_ALIGN)

    lowest = tl.where(inside, lower, float("inf")) if COLS != HALF else lower
    highest = tl.where(inside, lower, float("-inf")) if COLS != HALF else lower
    least_0 = _lowest(lowest, 1)
    most_0 = _highest(highest, 1)
    lowest = tl.where(inside, upper, float("inf")) if COLS != HALF else upper
    highest = tl.where(inside, upper, float("-inf")) if COLS != HALF else upper
    least_1 = _lowest(lowest, 1)
    most_1 = _highest(highest, 1)
    if GROUPS == 1:
        low_0, scale_0, bad_0 = _spread(_lower(least_0, least_1), _higher(most_0, most_1), LEAST)
        low_1, scale_1, bad_1 = low_0, scale_0, bad_0
    else:
        low_0, scale_0, bad_0 = _spread(least_0, most_0, LEAST)
        low_1, scale_1, bad_1 = _spread(least_1, most_1, LEAST)
    code = _nibble(lower, low_0[:, None], _inverse(scale_0)[:, None])
    code = code | (_nibble(upper, low_1[:, None], _inverse(scale_1)[:, None]) << 4)

    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    tl.store(codes + (r.to(tl.int64) * HALF)[:, None] + col[None, :], code.to(tl.uint8), mask=mask)
    pairs = codes + _padded(count.to(tl.int64) * HALF)
    _store_words(pairs, r * GROUPS, _pair(low_0, scale_0, bad_0), live)
    if GROUPS == 2:
        _store_words(pairs, r * GROUPS + 1, _pair(low_1, scale_1, bad_1), live)
    _pad(codes, count.to(tl.int64) * HALF, tile)
    _pad(pairs, count * GROUPS * 4, tile)


@triton.jit
def decode_groups_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    first_head,
    heads,  # that the cache has
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens
    r = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    live = r < heads * tokens
    at = first_head * tokens + r  # in the frame
    mask = live[:, None] & (col < HALF)[None, :]
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    code = tl.load(codes + (at.to(tl.int64) * HALF)[:, None] + col[None, :], mask=mask, other=0).to(
        tl.int32
    )
    pairs = codes + _padded(count.to(tl.int64) * HALF)
    low_0, scale_0, bad_0 = _pairs(pairs, at * GROUPS, live)
    low_1, scale_1, bad_1 = _pairs(pairs, at * GROUPS + (GROUPS - 1), live)
    lower = (code & 15).to(tl.float32) * scale_0[:, None] + low_0[:, None]
    upper = (code >> 4).to(tl.float32) * scale_1[:, None] + low_1[:, None]
    address, known = _addresses(
        row, offsets_ptr, n, r % tokens, r // tokens, live, count_blocks, count_units
    )
    mask = known[:, None] & (col < HALF)[None, :]
    _store(address, col, lower, bad_0[:, None], mask, KIND, CACHE_ALIGN)
    _store(address, HALF + col, upper, bad_1[:, None], mask, KIND, CACHE_ALIGN)


@triton.jit
def _level(step):
    square = step * step
    # fused where the host's is not: apart they take registers that sm_80 does not have
    third = tl.fma(square, tl.full(square.shape, _LEVEL_5, tl.float32), _LEVEL_3)
    return step * tl.fma(square, third, _LEVEL_1)


@triton.jit
def _step(y):
    """Give the step, 0.5 to 7.5 either way, of a normal variable."""
    a = tl.abs(y)
    k = 0.5 + (a > _EDGE_0).to(tl.float32) + (a > _EDGE_1).to(tl.float32)
    k += (a > _EDGE_2).to(tl.float32) + (a > _EDGE_3).to(tl.float32)
    k += (a > _EDGE_4).to(tl.float32) + (a > _EDGE_5).to(tl.float32)
    k += (a > _EDGE_6).to(tl.float32)
    return tl.where(y < 0, -k, k)


@triton.jit
def encode_rotated_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    rotation_ptr,  # fp16[2, WIDTH, WIDTH / 2]: signs and Hadamard matrix, its halves by column
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a piece
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # pieces of a program
):
    HALF: tl.constexpr = WIDTH // 2
    PIECES: tl.constexpr = DIM // WIDTH
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens * PIECES
    r = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    half = tl.arange(0, HALF)
    live = r < count
    line = r // PIECES
    item: tl.constexpr = 4 if KIND == _F32 else 2
    address, known = _addresses(
        row, offsets_ptr, n, line % tokens, line // tokens, live, count_blocks, count_units
    )
    address += r % PIECES * (WIDTH * item)
    x = _load(address, col, known[:, None], KIND, CACHE_ALIGN)
    matrix = rotation_ptr + col[:, None] * HALF + half[None, :]
    first = tl.load(matrix)
    second = tl.load(matrix + WIDTH * HALF)
    if _INTERPRETED:  # its products of bf16 are of bit patterns
        y_0 = tl.dot(x, first.to(tl.float32), input_precision="ieee")
        y_1 = tl.dot(x, second.to(tl.float32), input_precision="ieee")
    else:
        narrow = x.to(tl.float16 if KIND == _F16 else tl.bfloat16)
        y_0 = tl.dot(narrow, first.to(narrow.dtype))
        y_1 = tl.dot(narrow, second.to(narrow.dtype))
    square = tl.sum(y_0 * y_0, 1) + tl.sum(y_1 * y_1, 1)
    bad = (_bits(square) & _ABSOLUTE) >= _INFINITY
    dead = bad | (square < _LENGTH_MIN)
    norm = tl.where(dead, 0.0, tl.sqrt(WIDTH / tl.where(dead, 1.0, square)))[:, None]
    k_0 = _step(tl.where(bad[:, None], 0.0, y_0) * norm)
    k_1 = _step(tl.where(bad[:, None], 0.0, y_1) * norm)
    l_0 = _level(k_0)
    l_1 = _level(k_1)
    # keeps the length of the piece; 1 / WIDTH: two rotations, neither scaled
    length = tl.sum(l_0 * l_0, 1) + tl.sum(l_1 * l_1, 1)
    fit = tl.sqrt(tl.where(dead, 0.0, square)) / tl.sqrt(length) * (1.0 / WIDTH)
    code = (k_0 + 7.5).to(tl.int32) | (k_1 + 7.5).to(tl.int32) << 4

    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    place = (r.to(tl.int64) * HALF)[:, None] + half[None, :]
    tl.store(codes + place, code.to(tl.uint8), mask=live[:, None])
    scales = codes + _padded(count.to(tl.int64) * HALF)
    _store_halves(scales, r, tl.where(bad, _BF16_NAN, _near_bf16(fit)), live)
    _pad(codes, count.to(tl.int64) * HALF, tile)
    _pad(scales, count * 2, tile)


@triton.jit
def decode_rotated_kernel(  # type: ignore[no-untyped-def]
    components_ptr,
    offsets_ptr,
    frames_ptr,
    rotation_ptr,  # fp16[2, WIDTH / 2, WIDTH]: Hadamard matrix and signs, its halves by row
    first_block,
    count_blocks,
    count_units,
    tokens,
    tiles,
    first_head,
    heads,  # that the cache has
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CACHE_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = WIDTH // 2
    PIECES: tl.constexpr = DIM // WIDTH
    n, tile, row = _job(components_ptr, first_block, tiles)
    count = tl.load(row + _HEADS).to(tl.int32) * tokens * PIECES
    r = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    half = tl.arange(0, HALF)
    live = r < heads * tokens * PIECES
    at = first_head * tokens * PIECES + r  # in the frame
    line = r // PIECES
    codes = _bytes_at(tl.load(frames_ptr + n) + tl.load(row + _FRAME))
    place = (at.to(tl.int64) * HALF)[:, None] + half[None, :]
    code = tl.load(codes + place, mask=live[:, None], other=0).to(tl.int32)
    scale, bad = _scales(codes + _padded(count.to(tl.int64) * HALF), at, live)
    l_0 = _level((code & 15).to(tl.float32) - 7.5)
    l_1 = _level((code >> 4).to(tl.float32) - 7.5)
    matrix = rotation_ptr + half[:, None] * WIDTH + col[None, :]
    first = tl.load(matrix)
    second = tl.load(matrix + HALF * WIDTH)
    if _INTERPRETED:  # its products of bf16 are of bit patterns
        x = tl.dot(l_0, first.to(tl.float32), input_precision="ieee")
        x = tl.dot(l_1, second.to(tl.float32), acc=x, input_precision="ieee")
    else:
        x = tl.dot(l_0.to(tl.float16), first)
        x = tl.dot(l_1.to(tl.float16), second, acc=x)
    x = x * scale[:, None]
    if KIND == _F16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    item: tl.constexpr = 4 if KIND == _F32 else 2
    address, known = _addresses(
        row, offsets_ptr, n, line % tokens, line // tokens, live, count_blocks, count_units
    )
    address += r % PIECES * (WIDTH * item)
    _store(address, col, x, bad[:, None], known[:, None], KIND, CACHE_ALIGN)


def encode(
    scheme: str,
    table: Rows,
    blocks: Span,
    segments: Span,
    device: str | Launcher,
    ids: Ids | None = None,
) -> None:
    """Encode cache -> frames in the device's current stream, without digests.

    One launch for all layers and blocks, two where K and V differ in shape or scheme. Every address
    of `table` is one that the device can reach, and stays so until the stream has passed the
    launches. Ranges and errors as in `quant.encode`. `device` is torch's name of it, or a Launcher;
    with `ids` they stand in for the offsets of `table`, of which only the shape counts.
    """
    _launch(scheme, table, blocks, segments, device, ids, True)


def decode(
    scheme: str,
    table: Rows,
    blocks: Span,
    segments: Span,
    device: str | Launcher,
    ids: Ids | None = None,
) -> None:
    """Decode frames -> cache, of segments that are verified already; otherwise as `encode`."""
    _launch(scheme, table, blocks, segments, device, ids, False)


class Plan(NamedTuple):
    """How one shape of component is launched: kernel, constants, warps, programs a component."""

    kernel: Any  # triton's JITFunction has no types
    constants: dict[str, object]
    warps: int
    tiles: int


def plan(
    scheme: str, encodes: bool, heads: int, tokens: int, dim: int, dtype: str, keys: bool
) -> Plan:
    """Choose tiles for components [heads, tokens, dim]."""
    constants: dict[str, object] = {"KIND": KINDS[dtype], "DIM": dim}
    if scheme in ("int8", "fp8"):
        most = 127.0 if scheme == "int8" else 448.0
        cols = triton.next_power_of_2(dim)
        if quant.by_channel(scheme, keys):
            count = _rows(min(tokens, quant.CHUNK_TOKENS), quant.CHUNK_TOKENS)
            cols = min(cols, TILE // quant.CHUNK_TOKENS)
            constants |= {"ROWS": count, "COLS": cols}
            if encodes:
                constants["CAP"] = float(quant.cap(dtype, most))
            kernel = encode_columns_kernel if encodes else decode_columns_kernel
            parts = -(-dim // cols) * -(-tokens // quant.CHUNK_TOKENS)
            return Plan(kernel, constants, _warps(count * cols), heads * parts)
        count = _rows(heads * tokens, TILE // cols)
        constants |= {"MOST": most, "ROWS": count, "COLS": cols}
        if encodes:
            constants["CAP"] = float(quant.cap(dtype, most))
        kernel = encode_rows_kernel if encodes else decode_rows_kernel
        return Plan(kernel, constants, _warps(count * cols), -(-heads * tokens // count))
    if scheme == "rot4":
        width = quant.piece(dim)
        pieces = heads * tokens * dim // width
        count = max(16, _rows(pieces, TILE // width))
        constants |= {"WIDTH": width, "ROWS": count}
        kernel = encode_rotated_kernel if encodes else decode_rotated_kernel
        return Plan(kernel, constants, 4, -(-pieces // count))
    half = triton.next_power_of_2(dim // 2)
    if encodes:
        constants["LEAST"] = float(quant.lowest(dtype))
    if keys:
        cols = min(half, WIDTH_MAX)
        count = _rows(min(tokens, quant.CHUNK_TOKENS), quant.CHUNK_TOKENS)
        constants |= {"ROWS": count, "COLS": cols}
        parts = -(-(dim // 2) // cols) * -(-tokens // quant.CHUNK_TOKENS)
        kernel = encode_channels_kernel if encodes else decode_channels_kernel
        return Plan(kernel, constants, _warps(2 * count * cols), heads * parts)
    count = _rows(heads * tokens, TILE // 2 // half)
    constants |= {"GROUPS": quant.groups(dim), "ROWS": count, "COLS": half}
    kernel = encode_groups_kernel if encodes else decode_groups_kernel
    return Plan(kernel, constants, _warps(2 * count * half), -(-heads * tokens // count))


def _rows(count: int, most: int) -> int:
    return max(1, min(int(triton.next_power_of_2(count)), most))


def _warps(elements: int) -> int:
    """Give a thread 64 elements: fewer leave loads too few, more spill."""
    return max(1, min(4, elements // 2048))


@functools.cache
def rotation(width: int, encodes: bool) -> npt.NDArray[np.float16]:
    """Return the matrix of a rotation or its inverse, cut in halves; its entries are exact."""
    matrix = quant.hadamard(width)
    if encodes:
        matrix = np.stack(np.split(quant.signs(width)[:, None] * matrix, 2, axis=1))
    else:
        matrix = np.stack(np.split(matrix * quant.signs(width), 2, axis=0))
    return np.ascontiguousarray(matrix, np.float16)


def _launch(
    scheme: str,
    table: Rows,
    blocks: Span,
    segments: Span,
    device: str | Launcher,
    ids: Ids | None,
    encodes: bool,
) -> None:
    quant.check(scheme, table, blocks, segments)
    if encodes:
        table.expect_whole()
    chosen = table.segments[slice(*segments)]
    if blocks[0] == blocks[1] or len(chosen) == 0:
        return
    first = int(chosen[:, rows.FIRST].min())
    last = int((chosen[:, rows.FIRST] + chosen[:, rows.COUNT]).max())
    assert int(chosen[:, rows.COUNT].sum()) == last - first  # one stretch of components
    components, kept = table.components[first:last], table.counts[first:last]
    on = launcher(device)
    _, count_blocks, count_units = table.offsets.shape
    offsets = on.table(table.offsets) if ids is None else ids.offsets(table, on)
    frames = on.table(table.frames)
    shapes = components[:, [rows.HEADS, rows.DIM, rows.KEYS]].copy()
    if not quant.by_channel(scheme, True):
        shapes[:, 2] = 1
    for heads, dim, keys in np.unique(shapes, axis=0).tolist():
        which = (shapes == (heads, dim, keys)).all(axis=1)
        mine, count = np.ascontiguousarray(components[which]), int(kept[which][0])
        how = plan(scheme, encodes, count, table.tokens, dim, table.dtype, bool(keys))
        tables = [on.table(mine), offsets, frames]
        if scheme == "rot4":
            tables.append(on.table(rotation(quant.piece(dim), encodes)))
        grid = ((blocks[1] - blocks[0]) * how.tiles, len(mine))
        counts = [blocks[0], count_blocks, count_units, table.tokens, how.tiles]
        if not encodes:
            counts += [table.heads[0], count]
        align = table.alignment(mine, table.offsets if ids is None else ids.strides)
        constants = how.constants | {"CACHE_ALIGN": align}
        on.run(how.kernel, grid, (*tables, *counts), constants, num_warps=how.warps)


def _variant(
    scheme: str,
    encodes: bool,
    what: str,
    heads: int,
    tokens: int,
    dim: int,
    keys: bool = True,
    dtype: str = "bfloat16",
) -> Variant:
    how = plan(scheme, encodes, heads, tokens, dim, dtype, keys)
    tables = {"components_ptr": "*i64", "offsets_ptr": "*i64", "frames_ptr": "*i64"}
    if scheme == "rot4":
        tables["rotation_ptr"] = "*fp16"
    counts = ["first_block", "count_blocks", "count_units", "tokens", "tiles"]
    if not encodes:
        counts += ["first_head", "heads"]
    across = {"rot4": "WIDTH", "int8": "COLS", "fp8": "COLS"}.get(scheme)
    count, width = (how.constants[name] for name in ("ROWS", across or "COLS"))
    assert isinstance(count, int) and isinstance(width, int)
    return Variant(
        f"{scheme} {'encode' if encodes else 'decode'} {what}",
        how.kernel,
        signature=tables | dict.fromkeys(counts, "i32"),
        constants=how.constants | {"CACHE_ALIGN": 16},
        aligned=tuple(tables),
        num_warps=how.warps,
        elements=count * width * (1 if across else 2),
        # gfx942's matrix cores hand rows out in pieces: what is made of their products is narrower
        store_bits=128 if scheme != "rot4" else 32 if encodes else 64,
    )


# Rows of Llama-3.1-8B: 8 heads of 128, blocks of 16 and 64 tokens.
VARIANTS = tuple(
    _variant(scheme, encodes, what, *shape)
    for encodes in (True, False)
    for scheme, what, *shape in (
        ("int8", "keys of 128, 16 tokens", 8, 16, 128),
        ("int8", "keys of 128, 64 tokens", 8, 64, 128),
        ("int8", "fp32 keys of 128, 64 tokens", 8, 64, 128, True, "float32"),
        ("int8", "values of 128", 8, 64, 128, False),
        ("int8", "fp16 values of 128", 8, 64, 128, False, "float16"),
        ("int8", "fp32 values of 128", 8, 64, 128, False, "float32"),
        ("fp8", "rows of 128", 8, 64, 128),
        ("int4", "keys of 128, 16 tokens", 8, 16, 128),
        ("int4", "keys of 128, 64 tokens", 8, 64, 128),
        ("int4", "values of 128", 8, 64, 128, False),
        ("rot4", "rows of 128", 8, 64, 128),
    )
)
