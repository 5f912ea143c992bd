"""Lossy codecs: int8, fp8, int4 and rot4. A row in, codes and scales out, and back.

    scheme  codes                                             scales                bits, dim 128
    int8    absolute maximum / 127, nearest; keys: of a       bf16 a channel        8.25 (64 tokens)
            channel over up to 64 tokens; values: of a row    bf16 a row            8.125
    fp8     e4m3, absolute maximum / 448, nearest             bf16 a row            8.125
    int4    keys: (x - low) / scale of a channel over up to   two bf16 a channel    4.5 (64 tokens)
            64 tokens; values: of a group of a row's channels two bf16 a group      4.5
    rot4    random signs and a Hadamard rotation of each      bf16 a piece          4.125
            piece of a row, 16 levels of a normal variable

Sources: KIVI (arXiv 2402.02750) for keys by channel and values by token, QuaRot (arXiv 2404.00456)
and TurboQuant (arXiv 2504.19874) for the rotation, OCP 8-bit floating point for e4m3.

An encoded component is two planes, each padded with zeros to a multiple of 16 bytes: codes
[heads, tokens, dim] and scales. 4-bit codes of a row (rot4: of a piece) stand in bytes: channel j
in the low half of byte j, channel j + dim / 2 in the high half. All arithmetic is of single
precision with integer rounding, so that every path gives the same codes; rot4's rotation adds in
any order, and its codes may differ where a value lies on an edge between two levels.

What is not finite: a row (int8 values, fp8), channel (int8 keys), piece (rot4) or group (int4) with
a NaN or an infinity comes back as NaN, all of it, and so does one whose spread (int4) or squared
length (rot4) overflows. What
is smaller than single precision's normal numbers comes back as zero. Nothing finite becomes
infinite.

Three ways give the same bytes: the compiled path (`quant_native.py`), the plain one here, which is
the reference as well, and the Triton kernels (`quant_device.py`).
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from kvengine.kernels import copy, launch
from kvengine.kernels.copy import Span, bytes_at
from kvengine.kernels.digest import digest_spans
from kvengine.kernels.rows import DIM, FRAME, HEADS, KEYS, NBYTES, OFFSET, Rows

SCHEMES = ("int8", "fp8", "int4", "rot4")
PLANE_ALIGN = 16
CHUNK_TOKENS = 64  # tokens of a channel of int8 or int4 keys that are coded together, at most
WIDE_DIM = 64  # int4 values of longer rows have a group for each half
PIECE_MAX = 128  # channels that are rotated together, at most
PIECE_MIN = 16

NORMAL_MIN = np.float32(2.0**-126)
INFINITY = 0x7F80_0000  # its bits
BF16_NAN = 0x7FC0
NAN_WORDS: Mapping[str, int] = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC0_0000}
LARGEST: Mapping[str, float] = {
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "float16": 65504.0,
    "float32": (2 - 2**-23) * 2.0**127,
}
SPREAD_MAX = 0x7D88_0000  # bits of the largest bf16 scale whose 15 steps are finite
# Edges between the levels of a normal variable, and the odd polynomial that gives the levels.
EDGES = (0.2578, 0.5228, 0.8011, 1.1024, 1.4434, 1.8539, 2.4114)
LEVEL_1, LEVEL_3, LEVEL_5 = 0.263819, 9.5e-05, 3.0e-05
LENGTH_MIN = 2.0**-100  # squared length of a rotated piece that is not taken for zero

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.unsignedinteger]
Halves = npt.NDArray[np.uint16]
Doubles = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]


def fits(scheme: str, dim: int) -> str | None:
    """Say what is wrong with rows of `dim` elements for a scheme, in words; None if nothing is."""
    if scheme == "int4" and dim % 2:
        return f"int4 packs channels in pairs: heads of {dim} are odd"
    if scheme == "rot4" and dim % PIECE_MIN:
        return f"rot4 rotates {PIECE_MIN} channels or more: heads of {dim} are no multiple of it"
    return None


def piece(dim: int) -> int:
    """Return how many channels of a row rot4 rotates together: the largest power of two in it."""
    return min(dim & -dim, PIECE_MAX)


def planes(scheme: str, heads: int, tokens: int, dim: int, keys: bool) -> tuple[int, int]:
    """Return the bytes of an encoded component's codes and of its scales, padding included."""
    rows = heads * tokens
    if scheme in ("int8", "fp8"):
        codes, scales = rows * dim, 2 * rows
        if by_channel(scheme, keys):
            scales = 2 * heads * dim * -(-tokens // CHUNK_TOKENS)
    elif scheme == "rot4":
        codes, scales = rows * dim // 2, 2 * rows * (dim // piece(dim))
    elif keys:
        codes, scales = rows * dim // 2, 4 * heads * dim * -(-tokens // CHUNK_TOKENS)
    else:
        codes, scales = rows * dim // 2, 4 * rows * groups(dim)
    return _padded(codes), _padded(scales)


def by_channel(scheme: str, keys: bool) -> bool:
    """Tell whether a component has scales of channels: keys have a few that are far larger."""
    return keys and scheme in ("int8", "int4")


def groups(dim: int) -> int:
    """Return how many groups the channels of a row of int4 values make."""
    return 2 if dim > WIDE_DIM else 1


def encode(
    scheme: str,
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    *,
    native: bool | None = None,
) -> None:
    """Encode cache -> frames, and write the digest of each encoded segment.

    Ranges as in `copy.gather`; digests: uint64[N, S, 2]. With numba the interpreter's lock is
    released for all but a few microseconds a block; `native=False` is the plain path. Raises
    ValueError for a scheme, range or table that does not fit, ImportError for native=True without
    numba.
    """
    check(scheme, rows, blocks, segments)
    rows.expect_whole()
    copy.expect_status(rows, digests)
    compiled = launch.quantizers(native)
    for n in range(*blocks):
        if compiled is not None:
            compiled.encode(scheme, rows, n, segments)
        else:
            for s in range(*segments):
                _encode_segment(scheme, rows, n, s)
        _digest(rows, n, segments, digests)


def decode(
    scheme: str,
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
    *,
    native: bool | None = None,
) -> None:
    """Verify encoded segments, decode the good ones to the cache, and write verdicts.

    digests: uint64[N, S, 2], what each encoded segment's digest must be; verdicts: uint8[N, S],
    copy.GOOD or copy.BAD. The cache is left alone where a segment is BAD. Only the heads that the
    cache has are decoded. Otherwise as `encode`.
    """
    check(scheme, rows, blocks, segments)
    copy.expect_status(rows, digests, verdicts)
    compiled = launch.quantizers(native)
    found = np.empty_like(digests)
    for n in range(*blocks):
        _digest(rows, n, segments, found)
        for s in range(*segments):
            good = bool((found[n, s] == digests[n, s]).all())
            verdicts[n, s] = copy.GOOD if good else copy.BAD
        if compiled is not None:
            compiled.decode(scheme, rows, n, segments, verdicts)
        else:
            for s in range(*segments):
                if verdicts[n, s] == copy.GOOD:
                    _decode_segment(scheme, rows, n, s)


def encode_component(scheme: str, words: Words, dtype: str, keys: bool) -> Bytes:
    """Encode a component, words [heads, tokens, dim] of a dtype, to the bytes of its two planes."""
    heads, tokens, dim = words.shape
    values = floats(words, dtype)
    scales: Words
    if scheme == "int8":
        encode_steps = _encode_columns if keys else _encode_rows
        codes, scales = encode_steps(values, 127.0, dtype, _nearest_int8)
    elif scheme == "fp8":
        codes, scales = _encode_rows(values, 448.0, dtype, _nearest_e4m3)
    elif scheme == "rot4":
        codes, scales = _encode_rotated(values)
    elif keys:
        codes, scales = _encode_channels(values, lowest(dtype))
    else:
        codes, scales = _encode_groups(values, lowest(dtype))
    code_bytes, scale_bytes = planes(scheme, heads, tokens, dim, keys)
    out = np.zeros(code_bytes + scale_bytes, np.uint8)
    out[: codes.nbytes] = codes.reshape(-1).view(np.uint8)
    out[code_bytes : code_bytes + scales.nbytes] = scales.reshape(-1).view(np.uint8)
    return out


def decode_component(
    scheme: str, data: Bytes, heads: int, tokens: int, dim: int, dtype: str, keys: bool
) -> Words:
    """Decode what `encode_component` gave: words [heads, tokens, dim]."""
    code_bytes, _ = planes(scheme, heads, tokens, dim, keys)
    codes, scales = data[:code_bytes], data[code_bytes:]
    shape = (heads, tokens, dim)
    if scheme == "int8":
        steps = codes[: heads * tokens * dim].view(np.int8).reshape(shape).astype(np.float32)
        return _scaled_columns(steps, scales, dtype) if keys else _scaled(steps, scales, 1, dtype)
    if scheme == "fp8":
        return _scaled(_of_e4m3(codes[: heads * tokens * dim].reshape(shape)), scales, 1, dtype)
    codes = codes[: heads * tokens * dim // 2]
    if scheme == "rot4":
        nibbles = _unpacked(codes.reshape(heads, tokens, -1, piece(dim) // 2))
        return _decode_rotated(nibbles, scales, dtype)
    nibbles = _unpacked(codes.reshape(heads, tokens, -1))
    return _decode_groups(nibbles, scales, dtype, keys)


# Elements and words


def floats(words: Words, dtype: str) -> Floats:
    """Return the values of words of a dtype, exactly."""
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        return words.view(np.float16).astype(np.float32)
    return words.view(np.float32)


def words_of(values: Floats, dtype: str) -> Words:
    """Return finite values as words of a dtype, rounded to the nearest, ties to even."""
    if dtype == "bfloat16":
        return _bf16(values)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    return values.view(np.uint32)


def _bits(values: Floats) -> Doubles:
    return np.ascontiguousarray(values).view(np.uint32)


def _bf16(values: Floats) -> Halves:
    bits = _bits(values)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _of_bf16(words: npt.NDArray[np.uint16]) -> Floats:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _inverse(scale: Floats) -> Floats:
    """Divide 1 by bf16 scales, to 13 bits; 0 for 0.

    No quotient is nearer to an edge between two numbers of 13 bits than four units in the last
    place of single precision, so that a device's approximate division gives the same.
    """
    with np.errstate(divide="ignore"):
        bits = _bits(np.float32(1) / scale)
    near = ((bits + np.uint32(0x400)) & np.uint32(0xFFFF_F800)).view(np.float32)
    return np.where(scale > 0, near, np.float32(0))


def cap(dtype: str, most: float) -> np.float32:
    """Return the largest bf16 scale that times `most` is a finite number of the dtype."""
    bits = np.float32(LARGEST[dtype] / most).view(np.uint32) & np.uint32(0xFFFF_0000)
    return np.float32(bits.view(np.float32))


def lowest(dtype: str) -> np.float32:
    """Return the lowest bf16 that is a finite number of the dtype."""
    return -cap(dtype, 1.0)


# int8 and fp8: a scale a row; int8's keys: a scale a channel


def _encode_rows(
    values: Floats, most: float, dtype: str, nearest: Callable[[Floats], Bytes], axis: int = 2
) -> tuple[Bytes, Halves]:
    magnitude = (_bits(values) & 0x7FFF_FFFF).max(axis=axis, keepdims=True)
    bad = magnitude >= INFINITY
    largest = np.where(bad, 0, magnitude).astype(np.uint32).view(np.float32)
    scale = np.minimum(_of_bf16(_bf16(largest * np.float32(1 / most))), cap(dtype, most))
    scale = np.where(scale < NORMAL_MIN, np.float32(0), scale)
    finite = np.where(bad, np.float32(0), values)
    steps = np.clip(finite * _inverse(scale), np.float32(-most), np.float32(most))
    return nearest(steps), np.where(bad, np.uint16(BF16_NAN), _bf16(scale))


def _encode_columns(
    values: Floats, most: float, dtype: str, nearest: Callable[[Floats], Bytes]
) -> tuple[Bytes, Halves]:
    parts = [
        _encode_rows(values[:, at : at + CHUNK_TOKENS], most, dtype, nearest, 1)
        for at in range(0, values.shape[1], CHUNK_TOKENS)
    ]
    codes, scales = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return codes, scales


def _nearest_int8(steps: Floats) -> Bytes:
    return np.rint(steps).astype(np.int8).view(np.uint8)


def _nearest_e4m3(steps: Floats) -> Bytes:
    bits = _bits(steps)
    absolute = bits & 0x7FFF_FFFF
    normal = ((absolute + 0x7_FFFF + ((absolute >> 20) & 1)) >> 20) - 960  # 8 * (127 - 7)
    small = np.rint(np.abs(steps) * np.float32(512)).astype(np.uint32)
    code = np.where(np.abs(steps) < np.float32(2.0**-6), small, normal)
    signed: Bytes = (code | (bits >> 31) << 7).astype(np.uint8)
    return signed


def _of_e4m3(codes: Bytes) -> Floats:
    wide = codes.astype(np.uint32)
    absolute = ((wide & 0x7F) << 20).view(np.float32) * np.float32(2.0**120)
    return (_bits(absolute) | (wide >> 7) << 31).view(np.float32)


def _scaled(steps: Floats, scales: Bytes, pieces: int, dtype: str) -> Words:
    """Multiply each piece of each row by its scale; a scale of NaN makes all of its own NaN."""
    heads, tokens, dim = steps.shape
    words = scales[: 2 * heads * tokens * pieces].view(np.uint16).reshape(heads, tokens, pieces)
    return _times(steps, np.repeat(words, dim // pieces, axis=2), dtype)


def _scaled_columns(steps: Floats, scales: Bytes, dtype: str) -> Words:
    """Multiply each channel of each chunk of tokens by its scale."""
    heads, tokens, dim = steps.shape
    chunks = -(-tokens // CHUNK_TOKENS)
    words = scales[: 2 * heads * chunks * dim].view(np.uint16).reshape(heads, chunks, dim)
    return _times(steps, np.repeat(words, CHUNK_TOKENS, axis=1)[:, :tokens], dtype)


def _times(steps: Floats, words: Halves, dtype: str) -> Words:
    bad = (words & 0x7F80) == 0x7F80
    scale = _of_bf16(np.where(bad, np.uint16(0), words))
    with np.errstate(over="ignore"):
        values = np.clip(steps * scale, np.float32(-LARGEST[dtype]), np.float32(LARGEST[dtype]))
    found = words_of(values, dtype)
    return np.where(bad, found.dtype.type(NAN_WORDS[dtype]), found)


# int4: a scale and the lowest value, a channel of keys or a group of values


def _encode_channels(values: Floats, least: np.float32) -> tuple[Bytes, Doubles]:
    codes, pairs = [], []
    for at in range(0, values.shape[1], CHUNK_TOKENS):
        nibbles, pair = _encode_spread(values[:, at : at + CHUNK_TOKENS], 1, least)
        codes.append(nibbles)
        pairs.append(pair)
    return _packed(np.concatenate(codes, axis=1)), np.concatenate(pairs, axis=1)


def _encode_groups(values: Floats, least: np.float32) -> tuple[Bytes, Doubles]:
    heads, tokens, dim = values.shape
    grouped = values.reshape(heads, tokens, groups(dim), -1)
    nibbles, pairs = _encode_spread(grouped, 3, least)
    return _packed(nibbles.reshape(values.shape)), pairs.reshape(heads, tokens, -1)


def _encode_spread(values: Floats, axis: int, least: np.float32) -> tuple[Bytes, Doubles]:
    """Give codes of 0..15 between the lowest and the highest value along an axis.

    least: what the lowest may be, stored as bf16 and given back as the values' dtype.
    """
    bad = ((_bits(values) & 0x7FFF_FFFF).max(axis=axis, keepdims=True)) >= INFINITY
    finite = np.where(bad, np.float32(0), values)
    low = finite.min(axis=axis, keepdims=True) + np.float32(0)  # no zero has a sign
    high = finite.max(axis=axis, keepdims=True)
    low = np.maximum(_of_bf16(_floor_bf16(low)), least)
    share = np.float32(1 / 15)
    scale = (_bits(high * share - low * share) & np.uint32(0x7FFF_0000)).view(np.float32)
    bad |= _bits(scale) > SPREAD_MAX
    scale = np.where(bad | (scale < NORMAL_MIN), np.float32(0), scale)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.clip((finite - low) * _inverse(scale), np.float32(0), np.float32(15))
    lows = np.where(bad, np.uint32(BF16_NAN), _bits(low) >> 16)
    nibbles = np.where(bad, np.float32(0), np.rint(steps)).astype(np.uint8)
    pairs: Doubles = (_bits(scale) >> 16 | lows << 16).astype(np.uint32)
    return nibbles, pairs


def _floor_bf16(values: Floats) -> Halves:
    bits = _bits(values)
    down = np.where(bits >> 31 == 1, np.uint32(0xFFFF), np.uint32(0))
    return ((bits + down) >> 16).astype(np.uint16)


def _decode_groups(nibbles: Bytes, scales: Bytes, dtype: str, keys: bool) -> Words:
    heads, tokens, dim = nibbles.shape
    if keys:
        chunks = -(-tokens // CHUNK_TOKENS)
        pairs = scales[: 4 * heads * chunks * dim].view(np.uint32).reshape(heads, chunks, dim)
        pairs = np.repeat(pairs, CHUNK_TOKENS, axis=1)[:, :tokens]
    else:
        count = groups(dim)
        pairs = scales[: 4 * heads * tokens * count].view(np.uint32).reshape(heads, tokens, count)
        pairs = np.repeat(pairs, dim // count, axis=2)
    bad = ((pairs >> 16) & 0x7F80) == 0x7F80
    pairs = np.where(bad, np.uint32(0), pairs)
    scale = (pairs << 16).view(np.float32)
    low = (pairs & np.uint32(0xFFFF_0000)).view(np.float32)
    found = words_of(nibbles.astype(np.float32) * scale + low, dtype)
    return np.where(bad, found.dtype.type(NAN_WORDS[dtype]), found)


def _packed(nibbles: Bytes) -> Bytes:
    half = nibbles.shape[-1] // 2
    packed: Bytes = nibbles[..., :half] | (nibbles[..., half:] << 4).astype(np.uint8)
    return packed


def _unpacked(codes: Bytes) -> Bytes:
    return np.concatenate([codes & 15, codes >> 4], axis=-1)


# rot4: a rotation, sixteen levels, a length a piece


def signs(count: int) -> Floats:
    """Return the signs of the channels of a piece: the top bits of a linear congruence."""
    state, found = 1, []
    for _ in range(count):
        state = (state * 1664525 + 1013904223) & 0xFFFF_FFFF
        found.append(1.0 if state >> 31 else -1.0)
    return np.array(found, np.float32)


def hadamard(count: int) -> Floats:
    """Return Sylvester's Hadamard matrix, entries 1 and -1. count: a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < count:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _encode_rotated(values: Floats) -> tuple[Bytes, Halves]:
    heads, tokens, dim = values.shape
    width = piece(dim)
    pieces = values.reshape(heads, tokens, -1, width)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        rotated = (pieces * signs(width)) @ hadamard(width)
        square = (rotated * rotated).sum(axis=3)
        bad = ~np.isfinite(square)
        zero = square < np.float32(LENGTH_MIN)
        norm = np.where(bad | zero, np.float32(0), np.sqrt(np.float32(width) / square))
        scaled = np.where(bad[..., None], np.float32(0), rotated) * norm[..., None]
        absolute = np.abs(scaled)
        steps = np.float32(0.5) + sum((absolute > np.float32(edge)).astype("f4") for edge in EDGES)
        steps = np.where(scaled < 0, -steps, steps).astype(np.float32)
        level = _level(steps)
        fit = np.sqrt(square) / np.sqrt((level * level).sum(axis=3)) * np.float32(1 / width)
    scales = np.where(bad, np.uint16(BF16_NAN), _bf16(np.where(zero | bad, np.float32(0), fit)))
    return _packed((steps + np.float32(7.5)).astype(np.uint8)), scales


def _level(steps: Floats) -> Floats:
    square = steps * steps
    inner = np.float32(LEVEL_1) + square * (np.float32(LEVEL_3) + square * np.float32(LEVEL_5))
    return steps * inner


def _decode_rotated(nibbles: Bytes, scales: Bytes, dtype: str) -> Words:
    heads, tokens, pieces, width = nibbles.shape
    level = _level(nibbles.astype(np.float32) - np.float32(7.5))
    back = (level @ hadamard(width)) * signs(width)
    return _scaled(back.reshape(heads, tokens, -1), scales, pieces, dtype)


# Tables


def _encode_segment(scheme: str, rows: Rows, n: int, s: int) -> None:
    for c, row, out in _components(scheme, rows, n, s):
        out[:] = encode_component(scheme, rows.words(n, c), rows.dtype, bool(row[KEYS]))


def _decode_segment(scheme: str, rows: Rows, n: int, s: int) -> None:
    for c, row, data in _components(scheme, rows, n, s):
        shape = (row[HEADS], rows.tokens, row[DIM])
        words = decode_component(scheme, data, *shape, rows.dtype, bool(row[KEYS]))
        rows.put(n, c, words)


def _components(scheme: str, rows: Rows, n: int, s: int) -> list[tuple[int, list[int], Bytes]]:
    """List each component of a segment: its number, its row, its bytes in the frame."""
    first, count = rows.segments[s, :2].tolist()
    found = []
    for c in range(first, first + count):
        row = rows.components[c].tolist()
        nbytes = sum(planes(scheme, row[HEADS], rows.tokens, row[DIM], bool(row[KEYS])))
        found.append((c, row, bytes_at(int(rows.frames[n]) + row[FRAME], nbytes)))
    return found


def _digest(rows: Rows, n: int, segments: Span, digests: npt.NDArray[np.uint64]) -> None:
    chosen = rows.segments[slice(*segments)]
    addresses = rows.frames[n] + chosen[:, OFFSET]
    nbytes = np.ascontiguousarray(chosen[:, NBYTES])
    digest_spans(addresses, nbytes, digests[n, slice(*segments)])


def check(scheme: str, rows: Rows, blocks: Span, segments: Span) -> None:
    """Raise ValueError for an unknown scheme, rows that it cannot take, and ranges outside."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    for dim in set(rows.components[:, DIM].tolist()):
        if wrong := fits(scheme, dim):
            raise ValueError(wrong)
    copy.expect_ranges(rows, blocks, segments)


def _padded(nbytes: int) -> int:
    return -(-nbytes // PLANE_ALIGN) * PLANE_ALIGN
