"""Fixed-rate lossless coding of bf16 K/V: 1.37 times smaller for blocks of 64 tokens, 1.33 for 16.

A component (K, V or a latent of one layer) is a matrix of tokens x channels, the channels of a
token being its heads one after the other. It is cut into tiles of up to 64 tokens and so many
channels that a tile has about 8192 elements; a tile has a fixed size:

    bytes        what
    n            sign and mantissa of each element, row by row; n elements
    n / 4, n / 8 codes of 3 bits; those of 8 elements are 24 bits: the low 16 in the first plane,
                 the others in the second
    channels     largest exponent of each channel
    the rest     exponents of the elements whose code is 7, row by row; zeros behind them

An element's code is how far its exponent lies below its channel's largest; 7 stands for an escape.
A tile with more escapes than room makes its block OVERFULL: to be stored as it is. Every bit
pattern comes back, NaN payloads included. What a decoder reads and writes never depends on the
bytes it is given.

Three ways give the same bytes: the compiled path (`lossless_native.py`), the plain one here, which
is the reference as well, and the Triton kernels (`lossless_device.py`). Called by the engine's
codec.
"""

import functools
from types import ModuleType

import numpy as np
import numpy.typing as npt

from kvengine.kernels import copy, launch
from kvengine.kernels.copy import BAD, GOOD, OVERFULL, Span, bytes_at, listed
from kvengine.kernels.digest import digest
from kvengine.kernels.rows import DIM, FRAME, HEADS, NBYTES, Rows

ELEMENTS = 8192  # of a tile at most: it is worked on in the nearest cache, or in registers
TOKENS_MAX = 64  # of a tile: exponents of a channel drift apart over more
GROUP = 8  # elements whose codes lie together; a head's dim is a multiple of it
WIDE = 64  # channels of a tile are a multiple of it, but for the last: vectors are whole
STRIPE = 64  # bytes: a tile's size is a multiple of it, so that copying and hashing it is aligned
ESCAPE = 7
SHORT_NBYTES = 240  # of a segment that has another form of the digest: it takes the plain path

# columns of a table of tiles
TOKEN, TOKENS, CHANNEL, CHANNELS, AT, SIZE = range(6)

Int64s = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]


@functools.lru_cache(256)
def tiles(tokens: int, channels: int) -> Int64s:
    """Cut a component: int64[tiles, 6], columns TOKEN and CHANNEL (the first of each), TOKENS and
    CHANNELS (counts), AT (offset in the encoded component), SIZE (bytes). Read-only.

    Raises ValueError for channels that are no multiple of 8.
    """
    if tokens < 1 or channels < 1 or channels % GROUP:
        raise ValueError(
            f"a component of {tokens} tokens x {channels} channels: lossless coding needs at least "
            f"one token, and channels that are a multiple of {GROUP}"
        )
    step = -(-tokens // -(-tokens // TOKENS_MAX))  # as even as can be
    pieces = -(-channels * (1 << (step - 1).bit_length()) // ELEMENTS)
    width = -(-channels // (pieces * WIDE)) * WIDE
    rows, at = [], 0
    for channel in range(0, channels, width):
        for token in range(0, tokens, step):
            counts = min(step, tokens - token), min(width, channels - channel)
            size = tile_nbytes(*counts)
            rows.append((token, counts[0], channel, counts[1], at, size))
            at += size
    table = np.array(rows, np.int64)
    table.flags.writeable = False
    return table


def tile_nbytes(tokens: int, channels: int) -> int:
    """Return the size of a tile, with room for about 9 escapes in 128 elements, at least 8."""
    count = tokens * channels
    used = escapes_at(count, channels)
    size = (used + count * 9 // 128) // STRIPE * STRIPE
    return size if size - used >= count // 16 else size + STRIPE


def escapes_at(count: int, channels: int) -> int:
    """Return where the escapes of a tile of so many elements begin."""
    return count + count // GROUP * 3 + channels


def encoded_nbytes(tokens: int, channels: int) -> int:
    """Return the bytes of an encoded component: a multiple of 64."""
    last = tiles(tokens, channels)[-1]
    return int(last[AT] + last[SIZE])


def pays(tokens: int, channels: int) -> bool:
    """Tell whether a component of bf16 gets smaller by an eighth or more."""
    if channels % GROUP:
        return False
    return encoded_nbytes(tokens, channels) * 8 <= tokens * channels * 2 * 7


def check(rows: Rows) -> None:
    """Raise ValueError unless components are bf16, and tile their segments in order as encoded.

    Called once for each layout: `encode` and `decode` rely on it and do not look again.
    """
    expect_bf16(rows)
    for s, (first, count, offset, nbytes) in enumerate(rows.segments.tolist()):
        at = offset
        for c in range(first, first + count):
            row = rows.components[c].tolist()
            if row[DIM] % GROUP:
                raise ValueError(
                    f"component {c} has heads of {row[DIM]} elements, expected a multiple of "
                    f"{GROUP}"
                )
            if row[FRAME] != at or at % STRIPE:
                raise ValueError(
                    f"component {c} is at byte {row[FRAME]}, expected {at}, a multiple of {STRIPE}"
                )
            at += encoded_nbytes(rows.tokens, row[HEADS] * row[DIM])
        if at - offset != nbytes:
            raise ValueError(f"segment {s} has {nbytes} bytes, its components {at - offset}")


def expect_bf16(rows: Rows) -> None:
    """Raise ValueError for elements of another dtype."""
    if rows.dtype != "bfloat16":
        raise ValueError(f"elements of {rows.dtype}: lossless coding knows bfloat16")


def encode(
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
    *,
    native: bool | None = None,
) -> None:
    """Code cache -> frames; write each segment's digest, and GOOD or OVERFULL as its verdict.

    blocks, segments: (first, last) ranges of `rows`, last excluded; only their bytes are written,
    every byte of a segment. digests: uint64[N, S, 2], (low, high); verdicts: uint8[N, S]. The bytes
    of an OVERFULL segment are not to be used. With numba the interpreter's lock is released for the
    whole call. Raises ValueError for what does not fit, ImportError for native=True without numba.
    """
    _fits(rows, blocks, segments, digests, verdicts)
    rows.expect_whole()
    compiled = _compiled(rows, native)
    if compiled is None:
        encode_reference(rows, blocks, segments, digests, verdicts)
        return
    past = copy.streams(rows, blocks, segments)
    compiled.encode(*_tables(rows), *blocks, *segments, digests, verdicts, past)


def decode(
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
    *,
    native: bool | None = None,
) -> None:
    """Code frames -> cache, and write a verdict on each segment: GOOD or BAD.

    digests: what each segment's digest must be. What is hashed is what is decoded; where a segment
    is BAD its bytes in the cache may be the old ones, wrong ones, or both. Where the cache has a
    few heads, tiles with channels of theirs are decoded whole, others not at all. Otherwise as
    `encode`.
    """
    _fits(rows, blocks, segments, digests, verdicts)
    compiled = _compiled(rows, native)
    if compiled is None:
        decode_reference(rows, blocks, segments, digests, verdicts)
        return
    past = copy.streams(rows, blocks, segments)
    compiled.decode(*_tables(rows), *blocks, *segments, digests, verdicts, past, *rows.heads)


def _compiled(rows: Rows, native: bool | None) -> ModuleType | None:
    found = launch.coders(native)
    if found is None or rows.segments[:, NBYTES].min(initial=1 << 62) <= SHORT_NBYTES:
        return None
    return found


def encode_reference(
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    """Do what `encode` does, one tile at a time; the path of a machine without numba as well."""
    for n, s, frame, nbytes in listed(rows, blocks, segments):
        verdicts[n, s] = GOOD
        for c in _components(rows, s):
            words = _words(rows, n, c)
            for part, target in _tiles(rows, n, c):
                if not encode_tile(words[part], target):
                    verdicts[n, s] = OVERFULL
        digests[n, s] = digest(frame, nbytes)


def decode_reference(
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    """Do what `decode` does, one tile at a time; leave the cache alone where a segment is BAD."""
    for n, s, frame, nbytes in listed(rows, blocks, segments):
        good = digest(frame, nbytes) == tuple(digests[n, s].tolist())
        verdicts[n, s] = GOOD if good else BAD
        for c in _components(rows, s) if good else ():
            words = np.empty((rows.tokens, _channels(rows, c)), np.uint16)
            for part, source in _tiles(rows, n, c):
                words[part] = decode_tile(source, *words[part].shape)
            _put(rows, n, c, words)


def encode_tile(words: Words, target: Bytes) -> bool:
    """Write a tile of words [tokens, channels]; return whether its escapes have room."""
    count, channels = words.size, words.shape[1]
    exponent = (words >> 7 & 255).astype(np.uint8)
    top = exponent.max(axis=0)
    code = np.minimum(top - exponent, ESCAPE)
    codes = code.reshape(-1, GROUP).astype(np.uint32) << 3 * np.arange(GROUP, dtype=np.uint32)
    packed = codes.sum(axis=1, dtype=np.uint32)
    far = exponent[code == ESCAPE]
    at = escapes_at(count, channels)
    room = len(target) - at
    target[:count] = (words >> 8 & 128 | words & 127).astype(np.uint8).reshape(-1)
    target[count : count + count // 4].view("<u2")[:] = packed & 0xFFFF
    target[count + count // 4 : at - channels] = packed >> 16
    target[at - channels : at] = top
    target[at:] = 0
    target[at : at + len(far)] = far[:room]
    return len(far) <= room


def decode_tile(source: Bytes, tokens: int, channels: int) -> Words:
    """Return the words [tokens, channels] of a tile; escapes that have no room are zeros."""
    count = tokens * channels
    at = escapes_at(count, channels)
    mantissa = source[:count].astype(np.uint16).reshape(tokens, channels)
    packed = source[count : count + count // 4].view("<u2").astype(np.uint32)
    packed |= source[count + count // 4 : at - channels].astype(np.uint32) << 16
    shifted = packed[:, None] >> 3 * np.arange(GROUP, dtype=np.uint32)
    code = (shifted & 7).astype(np.uint8).reshape(tokens, channels)
    exponent = source[at - channels : at] - code
    escape = code == ESCAPE
    far = np.zeros(int(escape.sum()), np.uint8)
    room = source[at:][: len(far)]
    far[: len(room)] = room
    exponent[escape] = far
    words = (mantissa & 128) << 8 | exponent.astype(np.uint16) << 7 | mantissa & 127
    return words.astype(np.uint16, copy=False)


def escapes(words: Words) -> Int64s:
    """Count the escapes in each tile of a component's words [tokens, channels]."""
    exponent = words >> 7 & 255
    parts = [exponent[_part(tile)] for tile in tiles(*words.shape).tolist()]
    return np.array([int((part.max(axis=0) - part >= ESCAPE).sum()) for part in parts])


def _words(rows: Rows, n: int, c: int) -> Words:
    """Copy a component out of the cache: [tokens, channels]."""
    found = rows.words(n, c).swapaxes(0, 1)
    return found.reshape(rows.tokens, -1).astype(np.uint16, copy=False)


def _channels(rows: Rows, c: int) -> int:
    return int(rows.components[c, HEADS] * rows.components[c, DIM])


def _put(rows: Rows, n: int, c: int, words: Words) -> None:
    heads = int(rows.components[c, HEADS])
    rows.put(n, c, words.reshape(rows.tokens, heads, -1).swapaxes(0, 1))


def _components(rows: Rows, s: int) -> range:
    first, count = rows.segments[s, :2].tolist()
    return range(first, first + count)


def _tiles(rows: Rows, n: int, c: int) -> list[tuple[tuple[slice, slice], Bytes]]:
    """List (its part of the component's words, its bytes in the frame) of each tile."""
    at = int(rows.frames[n] + rows.components[c, FRAME])
    table = tiles(rows.tokens, _channels(rows, c))
    return [(_part(tile), bytes_at(at + tile[AT], tile[SIZE])) for tile in table.tolist()]


def _part(tile: list[int]) -> tuple[slice, slice]:
    token, tokens, channel, channels = tile[:4]
    return slice(token, token + tokens), slice(channel, channel + channels)


def _fits(
    rows: Rows,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    expect_bf16(rows)
    copy.expect_ranges(rows, blocks, segments)
    copy.expect_status(rows, digests, verdicts)


def _tables(rows: Rows) -> tuple[Int64s, ...]:
    channels = tuple((rows.components[:, HEADS] * rows.components[:, DIM]).tolist())
    return (
        rows.components,
        rows.offsets,
        rows.segments,
        rows.frames,
        *_plans(rows.tokens, channels),
    )


@functools.lru_cache(64)
def _plans(tokens: int, channels: tuple[int, ...]) -> tuple[Int64s, Int64s]:
    """Return the tiles of all components, and (first, count) of each component's: int64[C, 2]."""
    kinds = {each: tiles(tokens, each) for each in dict.fromkeys(channels)}
    ends = dict(zip(kinds, np.cumsum([len(each) for each in kinds.values()]), strict=True))
    plans = [(ends[each] - len(kinds[each]), len(kinds[each])) for each in channels]
    return np.concatenate(list(kinds.values())), np.array(plans, np.int64)
