"""The CPU fast path of `quant`: rows in, codes and scales out, compiled by numba.

Imported only through `kvengine.kernels.launch.quantizers`, on first use. Loops are written so that
the compiler makes vector code of them: maxima are of integers (the bits of positive numbers order
as the numbers do), an index that is computed is unsigned (a signed one may count from the end, and
becomes a gather), a row is widened to single precision in a buffer that stays in the first cache,
and rounding adds 1.5 * 2**23, which leaves the nearest integer in the low bits.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_cgutils
from numba.extending import intrinsic as typed_intrinsic
from numba.extending import register_jitable

from kvengine.kernels import quant
from kvengine.kernels.copy import GOOD, Span
from kvengine.kernels.rows import Rows

# numba annotates a part of itself, and an intrinsic as the function that makes its code
cgutils: Any = typed_cgutils
intrinsic: Any = typed_intrinsic
carray: Any = numba.carray  # type: ignore[attr-defined]  # numba exports it by its own means
CPointer: Any = types.CPointer

KINDS: Mapping[str, int] = {"bfloat16": 0, "float16": 1, "float32": 2}
BF16, F16 = 0, 1
F32 = np.float32
U32 = np.uint32
U64 = np.uint64
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23
ABSOLUTE = np.uint32(0x7FFF_FFFF)
INFINITY = np.uint32(quant.INFINITY)
BF16_NAN = np.uint16(quant.BF16_NAN)
NORMAL_MIN = np.uint32(0x0080_0000)  # bits of 2**-126
VERDICT_GOOD = np.uint8(GOOD)
KIND_F32 = 2
CHUNK, WIDE_DIM, PIECE = quant.CHUNK_TOKENS, quant.WIDE_DIM, quant.PIECE_MAX
SPREAD_MAX = np.uint32(quant.SPREAD_MAX)
LARGEST = quant.LARGEST["bfloat16"]
LENGTH_MIN = np.float32(quant.LENGTH_MIN)
LEVEL_1, LEVEL_3, LEVEL_5 = (
    np.float32(value) for value in (quant.LEVEL_1, quant.LEVEL_3, quant.LEVEL_5)
)
EDGE_0, EDGE_1, EDGE_2, EDGE_3, EDGE_4, EDGE_5, EDGE_6 = (np.float32(edge) for edge in quant.EDGES)


def _pointer_to(item: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        kind = CPointer(item)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), codegen

    return pointer


_bytes_at, _halves_at, _words_at = (
    _pointer_to(item) for item in (types.uint8, types.uint16, types.uint32)
)


@intrinsic
def _float(typing: Any, bits: Any) -> Any:
    """Take 32 bits for a single-precision number."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """Take a single-precision number for its 32 bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def _key(typing: Any, value: Any) -> Any:
    """Give an integer that orders as the number does, NaN beyond the infinities."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        return builder.xor(bits, builder.and_(builder.ashr(bits, word(31)), word(0x7FFF_FFFF)))

    return types.int32(types.float32), codegen


def _extreme(comparison: str) -> Any:
    """Return the intrinsic (one, other) of the lower or higher one: numba's own take 64 bits."""

    @intrinsic
    def extreme(typing: Any, one: Any, other: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.select(builder.icmp_signed(comparison, *args), *args)

        return types.int32(types.int32, types.int32), codegen

    return extreme


_least, _greatest = _extreme("<"), _extreme(">")


def _prefetch(write: int) -> Any:
    """Return the intrinsic (address) that asks for a line of memory."""

    @intrinsic
    def fetch(typing: Any, address: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            word = ir.IntType(32)
            pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
            kinds = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
            name = "llvm.prefetch.p0"
            function = cgutils.get_or_insert_function(builder.module, kinds, name)
            builder.call(function, [pointer, word(write), word(3), word(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return fetch


_fetch_to_read, _fetch_to_write = _prefetch(0), _prefetch(1)


@intrinsic
def _of_half(typing: Any, word: Any) -> Any:
    """Widen a half-precision number, given as its 16 bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _half(typing: Any, value: Any) -> Any:
    """Round to half precision, as its 16 bits."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@register_jitable
def _bf16(value: Any) -> Any:
    """Round a finite number to bf16, as its 16 bits."""
    bits = _bits(value)
    return np.uint16((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


@register_jitable
def _of_bf16(word: Any) -> Any:
    return _float(U32(word) << U32(16))


@register_jitable
def _clip(value: Any, low: Any, high: Any) -> Any:
    value = value if value > low else low  # low for NaN
    return high if value > high else value


@register_jitable
def _load(address: int, dim: int, kind: int, out: Any) -> Any:
    """Widen a row to `out`; return the bits of its largest magnitude."""
    most = U32(0)
    if kind == BF16:
        halves = carray(_halves_at(address), dim)
        top = np.uint16(0)
        for i in range(dim):
            top = max(top, np.uint16(halves[i] & np.uint16(0x7FFF)))
            out[i] = _float(U32(halves[i]) << U32(16))
        most = U32(top) << U32(16)
    elif kind == F16:
        halves = carray(_halves_at(address), dim)
        for i in range(dim):
            out[i] = _of_half(halves[i])
            most = max(most, _bits(out[i]) & ABSOLUTE)
    else:
        words = carray(_words_at(address), dim)
        for i in range(dim):
            out[i] = _float(words[i])
            most = max(most, words[i] & ABSOLUTE)
    return most


@register_jitable
def _store(values: Any, address: int, dim: int, kind: int) -> None:
    """Round a row of finite numbers to the cache."""
    if kind == BF16:
        halves = carray(_halves_at(address), dim)
        for i in range(dim):
            halves[i] = _bf16(values[i])
    elif kind == F16:
        halves = carray(_halves_at(address), dim)
        for i in range(dim):
            halves[i] = _half(values[i])
    else:
        words = carray(_words_at(address), dim)
        for i in range(dim):
            words[i] = _bits(values[i])


@register_jitable
def _store_nan(address: int, dim: int, kind: int) -> None:
    if kind == BF16:
        carray(_halves_at(address), dim)[:] = np.uint16(0x7FC0)
    elif kind == F16:
        carray(_halves_at(address), dim)[:] = np.uint16(0x7E00)
    else:
        carray(_words_at(address), dim)[:] = U32(0x7FC0_0000)


@register_jitable
def _inverse(scale: Any) -> Any:
    """Divide 1 by a scale above 0, to 13 bits: see `quant._inverse`."""
    return _float((_bits(F32(1) / scale) + U32(0x400)) & U32(0xFFFF_F800))


@register_jitable
def _row_scale(most: Any, share: Any, cap: Any) -> Any:
    """Return the scale of a row whose largest magnitude has these bits, and its inverse."""
    word = _bf16(_float(most) * share)
    scale = _of_bf16(word)
    if scale > cap:
        scale = cap
    if _bits(scale) < NORMAL_MIN:
        return np.uint16(0), F32(0)
    return np.uint16(_bits(scale) >> U32(16)), _inverse(scale)


@register_jitable
def _to_codes(values: Any, inverse: Any, codes: Any, most: Any) -> None:
    """Quantise a row: int8 where the largest step is 127, e4m3 where it is 448."""
    if most == F32(127):
        for i in range(len(codes)):
            step = _clip(values[i] * inverse, F32(-127), F32(127))
            codes[i] = np.uint8(_bits(step + MAGIC))
        return
    for i in range(len(codes)):
        bits = _bits(_clip(values[i] * inverse, F32(-448), F32(448)))
        absolute = bits & ABSOLUTE
        normal = ((absolute + U32(0x7_FFFF) + ((absolute >> U32(20)) & U32(1))) >> U32(20)) - U32(
            960
        )
        small = _bits(_float(absolute) * F32(512) + MAGIC) & U32(0xFF)
        code = small if absolute < U32(0x3C80_0000) else normal
        codes[i] = np.uint8(code | ((bits >> U32(24)) & U32(0x80)))


@register_jitable
def _of_codes(codes: Any, scale: Any, values: Any, most: Any) -> None:
    if most == F32(127):
        for i in range(len(codes)):
            values[i] = F32(np.int8(codes[i])) * scale
        return
    for i in range(len(codes)):
        code = U32(codes[i])
        absolute = code & U32(0x7F)
        normal = (absolute << U32(20)) + U32(0x3C00_0000)  # 120 << 23
        small = _bits(F32(np.int32(absolute)) * F32(1 / 512))
        bits = small if absolute < U32(8) else normal
        values[i] = _float(bits | (code & U32(0x80)) << U32(24)) * scale


@register_jitable
def _spread(low: Any, high: Any, most: Any, least: Any) -> Any:
    """Give low and scale of a group as words of bf16, low's value and the inverse of the scale.

    most: bits of the largest magnitude. A group that is not finite has an inverse of 0.
    """
    bits = _bits(low + F32(0))  # no zero has a sign
    down = U32(0xFFFF) if bits >> U32(31) else U32(0)
    bits = (bits + down) & U32(0xFFFF_0000)
    bits = _bits(least) if _float(bits) < least else bits
    share = F32(1 / 15)
    scale = _bits(high * share - _float(bits) * share) & U32(0x7FFF_0000)
    bad = (most >= INFINITY) | (scale > SPREAD_MAX)
    scale = U32(0) if bad | (scale < NORMAL_MIN) else scale
    inverse = _inverse(_float(scale if scale > U32(0) else U32(0x3F80_0000)))
    inverse = inverse if scale > U32(0) else F32(0)
    lows = U32(BF16_NAN) << U32(16) if bad else bits
    return (scale >> U32(16)) | lows, _float(U32(0) if bad else bits), inverse


@register_jitable
def _spreads(low: Any, high: Any, lows: Any, inverse: Any, pairs: Any, least: Any) -> None:
    """Do `_spread` of groups, by the keys of their lowest and highest values."""
    for i in range(len(pairs)):
        first, last = _of_key(low[i]), _of_key(high[i])
        most = max(_bits(first) & ABSOLUTE, _bits(last) & ABSOLUTE)
        pairs[i], lows[i], inverse[i] = _spread(first, last, most, least)


@register_jitable
def _nibble(value: Any, low: Any, inverse: Any) -> Any:
    step = _clip((value - low) * inverse, F32(0), F32(15))
    return _bits(step + MAGIC) & U32(15)


@register_jitable
def _of_key(key: Any) -> Any:
    return _float(U32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFF_FFFF))))


@register_jitable
def _extremes(values: Any, first: int, count: int) -> Any:
    """Give the keys of the lowest and the highest of `count` values from `first` on."""
    low, high = np.int32(0x7FFF_FFFF), np.int32(-0x8000_0000)
    for i in range(count):
        key = _key(values[U64(first) + U64(i)])
        low = _least(low, key)
        high = _greatest(high, key)
    return low, high


@register_jitable
def _rotate(values: Any, other: Any, width: int) -> Any:
    """Multiply by the Hadamard matrix, one bit of the index a stage; return where the result is.

    A stage takes the lowest bit of the index and puts it back as the highest, so that each one
    reads pairs that lie side by side and writes two runs.
    """
    half = width // 2
    stage = 1
    while stage < width:
        for i in range(half):
            one, two = values[U64(2) * U64(i)], values[U64(2) * U64(i) + U64(1)]
            other[i] = one + two
            other[U64(i) + U64(half)] = one - two
        values, other = other, values
        stage *= 2
    return values


@register_jitable
def _level(step: Any) -> Any:
    square = step * step
    return step * (LEVEL_1 + square * (LEVEL_3 + square * LEVEL_5))


@register_jitable
def _fetch(address: int, dim: int, kind: int, write: int) -> None:
    """Have a row brought into the caches: the processor sees no pattern in rows that lie apart."""
    for at in range(0, dim * (4 if kind == KIND_F32 else 2), 64):
        if write:
            _fetch_to_write(address + at)
        else:
            _fetch_to_read(address + at)


@register_jitable
def _zero(address: int, count: int) -> None:
    padding = carray(_bytes_at(address), count)
    for i in range(count):
        padding[i] = 0


def _compiled(*signature: Any, sums: bool = False) -> Callable[[Any], Callable[[], Any]]:
    """Give a function that gives the compiled one: each scheme is compiled when it is used.

    sums: sums may be added in any order. Nothing is raised for a division by zero.
    """
    kept = types.void(*signature)
    # numba's cache looks at names, and at the age of this file: what quant.py says is in the code
    stamp = zlib.crc32(Path(quant.__file__).read_bytes())
    how: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc"} if sums else False}

    def build(function: Any) -> Any:
        function.__qualname__ = f"{function.__name__}_{stamp:08x}"
        try:
            return numba.njit(kept, cache=True, **how)(function)
        except (RuntimeError, OSError):  # no directory for the cache, or no room in it
            return numba.njit(kept, **how)(function)

    return lambda function: functools.cache(lambda: build(function))


def _table(item: Any, ndim: int) -> Any:
    return types.Array(item, ndim, "C", readonly=True)


# components, offsets, segments, frames, tokens, kind, block, segments from and to
_TABLES = (
    _table(types.int64, 2),
    _table(types.int64, 3),
    _table(types.int64, 2),
    _table(types.int64, 1),
    *(types.int64,) * 5,
)


_HEADS = (types.int64, types.int64)  # first and last of those that the cache has
_VERDICTS = types.Array(types.uint8, 2, "C")
_SIGNS = types.Array(types.float32, 1, "C")


@register_jitable
def _row_at(offsets: Any, row: Any, n: int, t: int, h: int) -> Any:
    u = t if offsets.shape[2] > 1 else 0
    return row[0] + offsets[row[1], n, u] + t * row[2] + h * row[3]


@register_jitable
def _planes(frames: Any, row: Any, n: int, nbytes: int) -> Any:
    """Give the addresses of a component's planes; its codes have so many bytes."""
    codes = frames[n] + row[7]
    scales = codes + (nbytes + 15) // 16 * 16
    return codes, scales


@register_jitable
def _finish_planes(codes: int, scales: int, nbytes: int, scale_bytes: int) -> None:
    """Write the padding of a component's planes."""
    _zero(codes + nbytes, -nbytes % 16)
    _zero(scales + scale_bytes, -scale_bytes % 16)


@register_jitable
def _raise(address: int, dim: int, kind: int, most: Any) -> None:
    """Raise the bits of each channel's largest magnitude to those of a row."""
    if kind == BF16:
        halves = carray(_halves_at(address), dim)
        for i in range(dim):
            most[i] = max(most[i], U32(halves[i] & np.uint16(0x7FFF)) << U32(16))
    elif kind == F16:
        halves = carray(_halves_at(address), dim)
        for i in range(dim):
            most[i] = max(most[i], _bits(_of_half(halves[i])) & ABSOLUTE)
    else:
        words = carray(_words_at(address), dim)
        for i in range(dim):
            most[i] = max(most[i], words[i] & ABSOLUTE)


@register_jitable
def _column_scales(most: Any, scales: Any, inverse: Any, cap: Any) -> Any:
    """Do `_row_scale` of each channel, without a branch; return whether one is not finite."""
    any_bad = U32(0)
    for i in range(len(scales)):
        bad = U32(1) if most[i] >= INFINITY else U32(0)
        any_bad |= bad
        word = U32(_bf16(_float(U32(0) if bad else most[i]) * F32(1 / 127)))
        scale = _float(word << U32(16))
        bits = _bits(cap if scale > cap else scale)
        bits = U32(0) if bits < NORMAL_MIN else bits
        near = _inverse(_float(bits if bits > U32(0) else U32(0x3F80_0000)))
        inverse[i] = near if bits > U32(0) else F32(0)
        scales[i] = BF16_NAN if bad else np.uint16(bits >> U32(16))
    return any_bad


@register_jitable
def _encode_columns(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    scales_at: int,
    values: Any,
    cap: Any,
) -> None:
    """Encode int8 keys, a scale a channel of a chunk of tokens; rows are read twice."""
    heads, dim = row[4], row[5]
    chunks = (tokens + CHUNK - 1) // CHUNK
    most, inverse = np.empty(dim, np.uint32), np.empty(dim, np.float32)
    for h in range(heads):
        for chunk in range(chunks):
            start = chunk * CHUNK
            count = min(CHUNK, tokens - start)
            most[:] = 0
            for t in range(start, start + count):
                _fetch(_row_at(offsets, row, n, t, min(h + 1, heads - 1)), dim, kind, 0)
                _raise(_row_at(offsets, row, n, t, h), dim, kind, most)
            scales = carray(_halves_at(scales_at + 2 * (h * chunks + chunk) * dim), dim)
            bad = _column_scales(most, scales, inverse, cap)
            for t in range(start, start + count):
                _load(_row_at(offsets, row, n, t, h), dim, kind, values)
                codes = carray(_bytes_at(codes_at + (h * tokens + t) * dim), dim)
                for i in range(dim):
                    step = _clip(values[i] * inverse[i], F32(-127), F32(127))
                    codes[i] = np.uint8(_bits(step + MAGIC))
                if bad:
                    for i in range(dim):
                        codes[i] = np.uint8(0) if most[i] >= INFINITY else codes[i]


@register_jitable
def _decode_columns(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    scales_at: int,
    values: Any,
    first_head: int,
    last_head: int,
) -> None:
    dim = row[5]
    chunks = (tokens + CHUNK - 1) // CHUNK
    scale = np.empty(dim, np.float32)
    for h in range(first_head, last_head):
        for chunk in range(chunks):
            start = chunk * CHUNK
            words = carray(_halves_at(scales_at + 2 * (h * chunks + chunk) * dim), dim)
            bad = U32(0)
            for i in range(dim):
                nan = words[i] & np.uint16(0x7F80) == np.uint16(0x7F80)
                bad |= U32(1) if nan else U32(0)
                scale[i] = _of_bf16(np.uint16(0) if nan else words[i])
            for t in range(start, min(start + CHUNK, tokens)):
                codes = carray(_bytes_at(codes_at + (h * tokens + t) * dim), dim)
                for i in range(dim):
                    values[i] = F32(np.int8(codes[i])) * scale[i]
                target = _row_at(offsets, row, n, t, h - first_head)
                _fetch(target + (row[3] if h + 1 < last_head else 0), dim, kind, 1)
                _store(values, target, dim, kind)
                if bad:
                    for i in range(dim):
                        if words[i] & np.uint16(0x7F80) == np.uint16(0x7F80):
                            _store_nan(target + i * (4 if kind == KIND_F32 else 2), 1, kind)


@_compiled(*_TABLES, types.float32, types.float32)
def _encode_rows(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    most: Any,
    cap: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    for s in range(first, last):
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            count = heads * tokens
            codes_at, scales_at = _planes(frames, row, n, count * dim)
            if row[6] and most == F32(127):
                _encode_columns(offsets, row, n, tokens, kind, codes_at, scales_at, values, cap)
                scale_bytes = 2 * heads * dim * ((tokens + CHUNK - 1) // CHUNK)
                _finish_planes(codes_at, scales_at, count * dim, scale_bytes)
                continue
            scales = carray(_halves_at(scales_at), count)
            for t in range(tokens):
                for h in range(heads):
                    at = h * tokens + t
                    codes = carray(_bytes_at(codes_at + at * dim), dim)
                    _fetch(_row_at(offsets, row, n, min(t + 1, tokens - 1), h), dim, kind, 0)
                    largest = _load(_row_at(offsets, row, n, t, h), dim, kind, values)
                    if largest >= INFINITY:
                        scales[at] = BF16_NAN
                        codes[:] = 0
                        continue
                    word, inverse = _row_scale(largest, F32(1) / most, cap)
                    scales[at] = word
                    _to_codes(values, inverse, codes, most)
            _finish_planes(codes_at, scales_at, count * dim, 2 * count)


@_compiled(*_TABLES, *_HEADS, types.float32, _VERDICTS)
def _decode_rows(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    first_head: int,
    last_head: int,
    most: Any,
    verdicts: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    for s in range(first, last):
        if verdicts[n, s] != VERDICT_GOOD:
            continue
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            count = heads * tokens
            end = min(last_head, heads)
            codes_at, scales_at = _planes(frames, row, n, count * dim)
            if row[6] and most == F32(127):
                given = (offsets, row, n, tokens, kind, codes_at, scales_at, values)
                _decode_columns(*given, first_head, end)
                continue
            scales = carray(_halves_at(scales_at), count)
            for t in range(tokens):
                for h in range(first_head, end):
                    at, own = h * tokens + t, h - first_head
                    target = _row_at(offsets, row, n, t, own)
                    _fetch(_row_at(offsets, row, n, min(t + 1, tokens - 1), own), dim, kind, 1)
                    word = scales[at]
                    if word & np.uint16(0x7F80) == np.uint16(0x7F80):
                        _store_nan(target, dim, kind)
                        continue
                    codes = carray(_bytes_at(codes_at + at * dim), dim)
                    _of_codes(codes, _of_bf16(word), values, most)
                    _store(values, target, dim, kind)


@register_jitable
def _encode_channels(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    pairs_at: int,
    tile: Any,
    keys: Any,
    least: Any,
) -> None:
    """Encode int4 keys: a group is a channel of a chunk of tokens. tile: float32[chunk + 2, dim]"""
    heads, dim = row[4], row[5]
    half = dim // 2
    chunks = (tokens + CHUNK - 1) // CHUNK
    lows, inverse = tile[CHUNK], tile[CHUNK + 1]
    low, high = keys[0], keys[1]
    for h in range(heads):
        for chunk in range(chunks):
            start = chunk * CHUNK
            count = min(CHUNK, tokens - start)
            for t in range(count):
                values = tile[t]
                _load(_row_at(offsets, row, n, start + t, h), dim, kind, values)
                _fetch(_row_at(offsets, row, n, start + t, min(h + 1, heads - 1)), dim, kind, 0)
                if t == 0:
                    for i in range(dim):
                        low[i] = high[i] = _key(values[i])
                else:
                    for i in range(dim):
                        key = _key(values[i])
                        low[i] = _least(low[i], key)
                        high[i] = _greatest(high[i], key)
            pairs = carray(_words_at(pairs_at + 4 * (h * chunks + chunk) * dim), dim)
            _spreads(low, high, lows, inverse, pairs, least)
            for t in range(count):
                values = tile[t]
                codes = carray(_bytes_at(codes_at + (h * tokens + start + t) * half), half)
                for i in range(half):
                    j = i + half
                    lower = _nibble(values[i], lows[i], inverse[i])
                    upper = _nibble(values[j], lows[j], inverse[j])
                    codes[i] = np.uint8(lower | upper << U32(4))


@register_jitable
def _decode_channels(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    pairs_at: int,
    tile: Any,
    first_head: int,
    last_head: int,
) -> None:
    dim = row[5]
    half = dim // 2
    chunks = (tokens + CHUNK - 1) // CHUNK
    values, scale, low = tile[0], tile[1], tile[2]
    for h in range(first_head, last_head):
        for chunk in range(chunks):
            start = chunk * CHUNK
            pairs = carray(_words_at(pairs_at + 4 * (h * chunks + chunk) * dim), dim)
            bad = U32(0)
            for i in range(dim):
                nan = U32(1) if pairs[i] & U32(0x7F80_0000) == U32(0x7F80_0000) else U32(0)
                bad |= nan
                pair = U32(0) if nan else pairs[i]
                scale[i] = _float(pair << U32(16))
                low[i] = _float(pair & U32(0xFFFF_0000))
            for t in range(min(CHUNK, tokens - start)):
                codes = carray(_bytes_at(codes_at + (h * tokens + start + t) * half), half)
                for i in range(half):
                    j = i + half
                    values[i] = F32(np.int32(codes[i] & np.uint8(15))) * scale[i] + low[i]
                    values[j] = F32(np.int32(codes[i] >> np.uint8(4))) * scale[j] + low[j]
                target = _row_at(offsets, row, n, start + t, h - first_head)
                _fetch(target + (row[3] if h + 1 < last_head else 0), dim, kind, 1)
                _store(values, target, dim, kind)
                if bad:
                    for i in range(dim):
                        if pairs[i] & U32(0x7F80_0000) == U32(0x7F80_0000):
                            _store_nan(target + i * (4 if kind == KIND_F32 else 2), 1, kind)


@register_jitable
def _encode_groups(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    pairs_at: int,
    tile: Any,
    keys: Any,
    least: Any,
) -> None:
    """Encode int4 values: a group is a row, or a half of one. tile: float32[chunk + 2, dim]"""
    heads, dim = row[4], row[5]
    half = dim // 2
    groups = 2 if dim > WIDE_DIM else 1
    lows, inverse = tile[CHUNK], tile[CHUNK + 1]
    low, high = keys[0], keys[1]
    step = min(CHUNK, dim // groups)
    for h in range(heads):
        for start in range(0, tokens, step):
            count = min(step, tokens - start)
            for t in range(count):
                values = tile[t]
                _load(_row_at(offsets, row, n, start + t, h), dim, kind, values)
                _fetch(_row_at(offsets, row, n, start + t, min(h + 1, heads - 1)), dim, kind, 0)
                for group in range(groups):
                    at = groups * t + group
                    low[at], high[at] = _extremes(values, group * half, dim // groups)
            place = pairs_at + 4 * (h * tokens + start) * groups
            _spreads(low, high, lows, inverse, carray(_words_at(place), groups * count), least)
            for t in range(count):
                values = tile[t]
                at, last = groups * t, groups * t + groups - 1
                codes = carray(_bytes_at(codes_at + (h * tokens + start + t) * half), half)
                low_0, low_1 = lows[at], lows[last]
                inverse_0, inverse_1 = inverse[at], inverse[last]
                for i in range(half):
                    lower = _nibble(values[i], low_0, inverse_0)
                    upper = _nibble(values[i + half], low_1, inverse_1)
                    codes[i] = np.uint8(lower | upper << U32(4))


@register_jitable
def _decode_groups(
    offsets: Any,
    row: Any,
    n: int,
    tokens: int,
    kind: int,
    codes_at: int,
    pairs_at: int,
    tile: Any,
    first_head: int,
    last_head: int,
) -> None:
    heads, dim = row[4], row[5]
    half = dim // 2
    groups = 2 if dim > WIDE_DIM else 1
    values = tile[0]
    pairs = carray(_words_at(pairs_at), heads * tokens * groups)
    item = 4 if kind == KIND_F32 else 2
    for t in range(tokens):
        for h in range(first_head, last_head):
            at = h * tokens + t
            pair_0, pair_1 = pairs[groups * at], pairs[groups * at + groups - 1]
            codes = carray(_bytes_at(codes_at + at * half), half)
            scale_0, low_0 = _float(pair_0 << U32(16)), _float(pair_0 & U32(0xFFFF_0000))
            scale_1, low_1 = _float(pair_1 << U32(16)), _float(pair_1 & U32(0xFFFF_0000))
            for i in range(half):
                values[i] = F32(np.int32(codes[i] & np.uint8(15))) * scale_0 + low_0
                values[i + half] = F32(np.int32(codes[i] >> np.uint8(4))) * scale_1 + low_1
            target = _row_at(offsets, row, n, t, h - first_head)
            _store(values, target, dim, kind)
            if pair_0 & U32(0x7F80_0000) == U32(0x7F80_0000):
                _store_nan(target, half, kind)
            if pair_1 & U32(0x7F80_0000) == U32(0x7F80_0000):
                _store_nan(target + half * item, half, kind)


@register_jitable
def _pair_bytes(row: Any, tokens: int) -> Any:
    """Give the bytes of a component's pairs of scale and low."""
    heads, dim = row[4], row[5]
    if row[6]:
        return 4 * heads * dim * ((tokens + CHUNK - 1) // CHUNK)
    return 4 * heads * tokens * (2 if dim > WIDE_DIM else 1)


@_compiled(*_TABLES, types.float32)
def _encode_int4(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    least: Any,
) -> None:
    tile = np.empty((CHUNK + 2, components[:, 5].max()), np.float32)
    keys = np.empty((2, components[:, 5].max()), np.int32)
    for s in range(first, last):
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            nbytes, pair_bytes = row[4] * tokens * row[5] // 2, _pair_bytes(row, tokens)
            codes, pairs = _planes(frames, row, n, nbytes)
            if row[6]:
                _encode_channels(offsets, row, n, tokens, kind, codes, pairs, tile, keys, least)
            else:
                _encode_groups(offsets, row, n, tokens, kind, codes, pairs, tile, keys, least)
            _finish_planes(codes, pairs, nbytes, pair_bytes)


@_compiled(*_TABLES, *_HEADS, _VERDICTS)
def _decode_int4(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    first_head: int,
    last_head: int,
    verdicts: Any,
) -> None:
    tile = np.empty((3, components[:, 5].max()), np.float32)
    for s in range(first, last):
        if verdicts[n, s] != VERDICT_GOOD:
            continue
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            nbytes = row[4] * tokens * row[5] // 2
            codes, pairs = _planes(frames, row, n, nbytes)
            given = (offsets, row, n, tokens, kind, codes, pairs, tile)
            if row[6]:
                _decode_channels(*given, first_head, min(last_head, row[4]))
            else:
                _decode_groups(*given, first_head, min(last_head, row[4]))


@register_jitable
def _encode_piece(values: Any, other: Any, codes: Any, width: int) -> Any:
    """Encode a piece, its signs applied; return its scale as a word of bf16."""
    half = width // 2
    y = _rotate(values, other, width)
    square = F32(0)
    for i in range(width):
        square += y[i] * y[i]
    if not square < F32(np.inf):
        codes[:] = 0x88
        return BF16_NAN
    if square < LENGTH_MIN:
        codes[:] = 0x88
        return np.uint16(0)
    norm = np.sqrt(F32(width) / square)
    length = F32(0)
    for i in range(width):
        scaled = y[i] * norm
        absolute = abs(scaled)
        step = F32(0.5)
        step += F32(1) if absolute > EDGE_0 else F32(0)
        step += F32(1) if absolute > EDGE_1 else F32(0)
        step += F32(1) if absolute > EDGE_2 else F32(0)
        step += F32(1) if absolute > EDGE_3 else F32(0)
        step += F32(1) if absolute > EDGE_4 else F32(0)
        step += F32(1) if absolute > EDGE_5 else F32(0)
        step += F32(1) if absolute > EDGE_6 else F32(0)
        y[i] = -step if scaled < F32(0) else step
    for i in range(width):
        level = _level(y[i])
        length += level * level
    for i in range(half):
        lower = np.uint8(np.int32(y[i] + F32(7.5)))
        upper = np.uint8(np.int32(y[i + half] + F32(7.5)))
        codes[i] = lower | upper << np.uint8(4)
    return _bf16(np.sqrt(square) / np.sqrt(length) * (F32(1) / F32(width)))


@_compiled(*_TABLES, _SIGNS, sums=True)
def _encode_rot4(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    signs: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    piece = np.empty((2, PIECE), np.float32)
    for s in range(first, last):
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            width = min(dim & -dim, PIECE)
            pieces, half = dim // width, width // 2
            count = heads * tokens * pieces
            codes_at, scales_at = _planes(frames, row, n, count * half)
            scales = carray(_halves_at(scales_at), count)
            for t in range(tokens):
                for h in range(heads):
                    _load(_row_at(offsets, row, n, t, h), dim, kind, values)
                    for p in range(pieces):
                        at = (h * tokens + t) * pieces + p
                        for i in range(width):
                            piece[0, i] = values[p * width + i] * signs[i]
                        codes = carray(_bytes_at(codes_at + at * half), half)
                        scales[at] = _encode_piece(piece[0], piece[1], codes, width)
            _finish_planes(codes_at, scales_at, count * half, 2 * count)


@_compiled(*_TABLES, *_HEADS, _SIGNS, _VERDICTS, sums=True)
def _decode_rot4(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    first_head: int,
    last_head: int,
    signs: Any,
    verdicts: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    piece = np.empty((2, PIECE), np.float32)
    most = F32(65504) if kind == F16 else F32(LARGEST)
    item = 4 if kind == KIND_F32 else 2
    for s in range(first, last):
        if verdicts[n, s] != VERDICT_GOOD:
            continue
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            width = min(dim & -dim, PIECE)
            pieces, half = dim // width, width // 2
            count = heads * tokens * pieces
            codes_at, scales_at = _planes(frames, row, n, count * half)
            scales = carray(_halves_at(scales_at), count)
            for t in range(tokens):
                for h in range(first_head, min(last_head, heads)):
                    target = _row_at(offsets, row, n, t, h - first_head)
                    for p in range(pieces):
                        at = (h * tokens + t) * pieces + p
                        codes = carray(_bytes_at(codes_at + at * half), half)
                        start = piece[0]
                        for i in range(half):
                            lower = F32(np.int32(codes[i] & np.uint8(15))) - F32(7.5)
                            upper = F32(np.int32(codes[i] >> np.uint8(4))) - F32(7.5)
                            start[i] = _level(lower)
                            start[i + half] = _level(upper)
                        back = _rotate(start, piece[1], width)
                        scale = _of_bf16(scales[at])
                        for i in range(width):
                            value = back[i] * signs[i] * scale
                            values[p * width + i] = _clip(value, -most, most)
                    _store(values, target, dim, kind)
                    for p in range(pieces):
                        word = scales[(h * tokens + t) * pieces + p]
                        if word & np.uint16(0x7F80) == np.uint16(0x7F80):
                            _store_nan(target + p * width * item, width, kind)


STEPS: Mapping[str, float] = {"int8": 127.0, "fp8": 448.0}


def load(scheme: str) -> None:
    """Compile what a scheme needs, or load it from the cache."""
    if scheme in STEPS:
        _encode_rows(), _decode_rows()
    elif scheme == "int4":
        _encode_int4(), _decode_int4()
    else:
        _encode_rot4(), _decode_rot4()


def encode(scheme: str, rows: Rows, n: int, segments: Span) -> None:
    """Encode segments of one block: see `quant.encode`."""
    tables = (rows.components, rows.offsets, rows.segments, rows.frames)
    given = (*tables, rows.tokens, KINDS[rows.dtype], n, *segments)
    if scheme in STEPS:
        _encode_rows()(*given, STEPS[scheme], quant.cap(rows.dtype, STEPS[scheme]))
    elif scheme == "int4":
        _encode_int4()(*given, quant.lowest(rows.dtype))
    else:
        _encode_rot4()(*given, quant.signs(PIECE))


def decode(
    scheme: str, rows: Rows, n: int, segments: Span, verdicts: npt.NDArray[np.uint8]
) -> None:
    """Decode the good ones of one block's segments: see `quant.decode`."""
    tables = (rows.components, rows.offsets, rows.segments, rows.frames)
    given = (*tables, rows.tokens, KINDS[rows.dtype], n, *segments, *rows.heads)
    if scheme in STEPS:
        _decode_rows()(*given, STEPS[scheme], verdicts)
    elif scheme == "int4":
        _decode_int4()(*given, verdicts)
    else:
        _decode_rot4()(*given, quant.signs(PIECE), verdicts)
