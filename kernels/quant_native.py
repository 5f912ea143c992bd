"""The CPU fast path of `quant`: rows in, codes and scales out, compiled by numba.

Imported only through `kvengine.kernels.launch.quantizers`, on first use. Loops are written so that
the compiler makes vector code of them: maxima are of integers (the bits of positive numbers order
as the numbers do), a row is widened to single precision in a buffer that stays in the first cache,
and rounding adds 1.5 * 2**23, which leaves the nearest integer in the low bits.
"""

from collections.abc import Callable, Mapping
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
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23
ABSOLUTE = np.uint32(0x7FFF_FFFF)
INFINITY = np.uint32(quant.INFINITY)
BF16_NAN = np.uint16(quant.BF16_NAN)
NORMAL_MIN = np.uint32(0x0080_0000)  # bits of 2**-126
VERDICT_GOOD = np.uint8(GOOD)


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
    value = low if value < low else value
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
def _row_scale(most: Any, share: Any, cap: Any) -> Any:
    """Return the scale of a row whose largest magnitude has these bits, and its inverse."""
    word = _bf16(_float(most) * share)
    scale = _of_bf16(word)
    if scale > cap:
        scale = cap
    if _bits(scale) < NORMAL_MIN:
        return np.uint16(0), F32(0)
    return np.uint16(_bits(scale) >> U32(16)), F32(1) / scale


@register_jitable
def _int8_row(values: Any, inverse: Any, codes: Any) -> None:
    for i in range(len(codes)):
        step = _clip(values[i] * inverse, F32(-127), F32(127))
        codes[i] = np.uint8(_bits(step + MAGIC))


@register_jitable
def _zero(address: int, count: int) -> None:
    padding = carray(_bytes_at(address), count)
    for i in range(count):
        padding[i] = 0


def _compiled(*signature: Any) -> Callable[[Any], Any]:
    def compile(function: Any) -> Any:
        try:
            return numba.njit(types.void(*signature), nogil=True, cache=True)(function)
        except RuntimeError:  # no directory that the cache could be written to
            return numba.njit(types.void(*signature), nogil=True)(function)

    return compile


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


@register_jitable
def _row_at(offsets: Any, row: Any, n: int, t: int, h: int) -> Any:
    u = t if offsets.shape[2] > 1 else 0
    return row[0] + offsets[row[1], n, u] + t * row[2] + h * row[3]


@_compiled(*_TABLES, types.float32)
def _encode_int8(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    cap: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    for s in range(first, last):
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            codes_at = frames[n] + row[7]
            count = heads * tokens
            scales_at = codes_at + (count * dim + 15) // 16 * 16
            scales = carray(_halves_at(scales_at), count)
            for t in range(tokens):
                for h in range(heads):
                    at = h * tokens + t
                    codes = carray(_bytes_at(codes_at + at * dim), dim)
                    most = _load(_row_at(offsets, row, n, t, h), dim, kind, values)
                    if most >= INFINITY:
                        scales[at] = BF16_NAN
                        codes[:] = 0
                        continue
                    word, inverse = _row_scale(most, F32(1 / 127), cap)
                    scales[at] = word
                    _int8_row(values, inverse, codes)
            _zero(codes_at + count * dim, -(count * dim) % 16)
            _zero(scales_at + 2 * count, -(2 * count) % 16)


@_compiled(*_TABLES, types.Array(types.uint8, 2, "C"))
def _decode_int8(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    tokens: int,
    kind: int,
    n: int,
    first: int,
    last: int,
    verdicts: Any,
) -> None:
    values = np.empty(components[:, 5].max(), np.float32)
    for s in range(first, last):
        if verdicts[n, s] != VERDICT_GOOD:
            continue
        for c in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            row = components[c]
            heads, dim = row[4], row[5]
            codes_at = frames[n] + row[7]
            count = heads * tokens
            scales = carray(_halves_at(codes_at + (count * dim + 15) // 16 * 16), count)
            for t in range(tokens):
                for h in range(heads):
                    at = h * tokens + t
                    target = _row_at(offsets, row, n, t, h)
                    word = scales[at]
                    if word & np.uint16(0x7F80) == np.uint16(0x7F80):
                        _store_nan(target, dim, kind)
                        continue
                    scale = _of_bf16(word)
                    codes = carray(_bytes_at(codes_at + at * dim), dim)
                    for i in range(dim):
                        values[i] = F32(np.int8(codes[i])) * scale
                    _store(values, target, dim, kind)


def takes(scheme: str) -> bool:
    """Say whether a scheme is compiled."""
    return scheme == "int8"


def encode(scheme: str, rows: Rows, n: int, segments: Span) -> None:
    """Encode segments of one block: see `quant.encode`."""
    tables = (rows.components, rows.offsets, rows.segments, rows.frames)
    given = (rows.tokens, KINDS[rows.dtype], n, *segments)
    _encode_int8(*tables, *given, quant.cap(rows.dtype, 127.0))


def decode(
    scheme: str, rows: Rows, n: int, segments: Span, verdicts: npt.NDArray[np.uint8]
) -> None:
    """Decode the good ones of one block's segments: see `quant.decode`."""
    tables = (rows.components, rows.offsets, rows.segments, rows.frames)
    given = (rows.tokens, KINDS[rows.dtype], n, *segments)
    _decode_int8(*tables, *given, verdicts)
