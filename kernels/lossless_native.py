"""The CPU fast path of `lossless.py`, compiled by numba: vectors of 64 elements, one pass.

A tile is gathered into scratch memory that stays in the nearest cache, coded there, and copied to
its frame while it is hashed; decoding goes the other way. So what is hashed is what is decoded.
Imported only through `lossless.py`, on first use. Every function takes raw addresses and holds no
GIL.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_cgutils
from numba.extending import intrinsic as typed_intrinsic
from numba.extending import register_jitable

from kvengine.kernels import native
from kvengine.kernels.native import BAD, GOOD, I64, LAST_SECRET, START, STRIPE

# numba annotates a part of itself, and an intrinsic as the function that makes its code
cgutils: Any = typed_cgutils
intrinsic: Any = typed_intrinsic

I8, I16 = ir.IntType(8), ir.IntType(16)
GROUP = 8  # elements whose codes lie together
WIDE = 64  # elements of a vector
ESCAPE = 7
OVERFULL = np.uint8(3)
HEADS_MAX = 1 << 16
# Of a tile at most, and slack behind it. Coded it is the largest where it has one token only: a
# byte a channel beside 11 bits and a share of escapes for each element.
TILE_NBYTES = 20 << 10
TOKENS_MAX = 64  # of a tile
COMMON = 2  # escapes of a vector: those of K and V are 1 or 2 on average


def _vector(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, lanes: int) -> ir.Value:
    pointer = builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer())
    return builder.load(pointer, align=1)


def _put(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _all(kind: ir.Type, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _tops(lanes: int) -> Any:
    """Return the intrinsic (words, row bytes, rows, tops): the largest exponent of each channel."""

    @intrinsic
    def tops(typing: Any, words: Any, step: Any, count: Any, target: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            words, step, count, target = args
            wide = ir.VectorType(I16, lanes)
            most = cgutils.alloca_once_value(builder, ir.Constant(wide, [0] * lanes))
            with cgutils.for_range(builder, count) as loop:
                address = builder.add(words, builder.mul(loop.index, step))
                value = builder.and_(
                    _vector(builder, address, I16, lanes), _all(I16, lanes, 0x7FFF)
                )
                old = builder.load(most)
                more = builder.icmp_unsigned(">", value, old)
                builder.store(builder.select(more, value, old), most)
            top = builder.lshr(builder.load(most), _all(I16, lanes, 7))
            _put(builder, builder.trunc(top, ir.VectorType(I8, lanes)), target)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return tops


def _mask(builder: ir.IRBuilder, bits: ir.Value, lanes: int) -> ir.Value:
    mask = builder.bitcast(bits, ir.IntType(lanes))
    return builder.zext(mask, I64) if lanes < 64 else mask


def _coder(lanes: int) -> Any:
    """Return the intrinsic (words, tops, mantissas, low codes, high codes): code so many elements.

    It returns which of them are escapes.
    """

    @intrinsic
    def code(typing: Any, words: Any, tops: Any, mantissas: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            words, tops, mantissas, low, high = args
            narrow, groups = ir.VectorType(I8, lanes), lanes // GROUP
            value = _vector(builder, words, I16, lanes)
            shifted = builder.shl(value, _all(I16, lanes, 1))
            exponent = builder.trunc(builder.lshr(shifted, _all(I16, lanes, 8)), narrow)
            sign = builder.and_(builder.lshr(value, _all(I16, lanes, 8)), _all(I16, lanes, 128))
            mantissa = builder.or_(builder.and_(value, _all(I16, lanes, 127)), sign)
            _put(builder, builder.trunc(mantissa, narrow), mantissas)
            below = builder.sub(_vector(builder, tops, I8, lanes), exponent)
            near = builder.icmp_unsigned("<", below, _all(I8, lanes, ESCAPE))
            codes = builder.select(near, below, _all(I8, lanes, ESCAPE))
            # eight bytes of three bits come together in three steps, each within a word
            packed = builder.bitcast(codes, ir.VectorType(I64, groups))
            for shift, keep in ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0xFFFFFF)):
                moved = builder.lshr(packed, _all(I64, groups, shift))
                packed = builder.and_(builder.or_(packed, moved), _all(I64, groups, keep))
            _put(builder, builder.trunc(packed, ir.VectorType(I16, groups)), low)
            packed = builder.lshr(packed, _all(I64, groups, 16))
            _put(builder, builder.trunc(packed, ir.VectorType(I8, groups)), high)
            return _mask(builder, builder.not_(near), lanes)

        return types.int64(*[types.int64] * 5), codegen

    return code


def _decoder(lanes: int) -> Any:
    """Return the intrinsic (words, tops, mantissas, low codes, high codes): what `_coder` undoes.

    It returns which elements are escapes: their exponents are left zero.
    """

    @intrinsic
    def decode(typing: Any, words: Any, tops: Any, mantissas: Any, low: Any, high: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            words, tops, mantissas, low, high = args
            narrow, groups = ir.VectorType(I8, lanes), lanes // GROUP
            wide, lanes64 = ir.VectorType(I16, lanes), ir.VectorType(I64, groups)
            packed = builder.zext(_vector(builder, high, I8, groups), lanes64)
            packed = builder.shl(packed, _all(I64, groups, 16))
            packed = builder.or_(packed, builder.zext(_vector(builder, low, I16, groups), lanes64))
            for shift, keep in (
                (20, 0x00000FFF00000FFF),
                (10, 0x003F003F003F003F),
                (5, 0x0707070707070707),
            ):
                moved = builder.shl(packed, _all(I64, groups, shift))
                packed = builder.and_(builder.or_(packed, moved), _all(I64, groups, keep))
            codes = builder.bitcast(packed, narrow)
            far = builder.icmp_unsigned("==", codes, _all(I8, lanes, ESCAPE))
            exponent = builder.sub(_vector(builder, tops, I8, lanes), codes)
            exponent = builder.select(far, _all(I8, lanes, 0), exponent)
            mantissa = builder.zext(_vector(builder, mantissas, I8, lanes), wide)
            sign = builder.shl(builder.and_(mantissa, _all(I16, lanes, 128)), _all(I16, lanes, 8))
            word = builder.or_(builder.and_(mantissa, _all(I16, lanes, 127)), sign)
            moved = builder.shl(builder.zext(exponent, wide), _all(I16, lanes, 7))
            _put(builder, builder.or_(word, moved), words)
            return _mask(builder, far, lanes)

        return types.int64(*[types.int64] * 5), codegen

    return decode


_tops_wide, _tops_group = _tops(WIDE), _tops(GROUP)
_code_wide, _code_group = _coder(WIDE), _coder(GROUP)
_decode_wide, _decode_group = _decoder(WIDE), _decoder(GROUP)


@intrinsic
def _fetch(typing: Any, address: Any) -> Any:
    """Fetch the line at an address into the caches: a hint, any address will do."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        native._prefetch(builder, args[0], native.COPY)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _stream_line(typing: Any, source: Any, target: Any) -> Any:
    """Copy 64 bytes past the caches; the target begins with a line."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = args
        data = builder.load(native._pointer(builder, source), align=1)
        native._store(builder, data, target, native.STREAM)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _trailing_zeros(typing: Any, value: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), codegen


@register_jitable
def _code_tile(
    words: Any, coded: Any, tokens: int, channels: int, size: int, ahead: Any, nbytes: int
) -> bool:
    """Code words[tokens * channels] to coded[:size]; return whether the escapes have room.

    `ahead` is where each row of the next tile lies, of `nbytes` bytes: they are fetched meanwhile.
    """
    count = tokens * channels
    source, target = words.ctypes.data, coded.ctypes.data
    low, high, tops = target + count, target + count // 4 * 5, target + count // 8 * 11
    whole = channels - channels % WIDE
    for channel in range(0, whole, WIDE):
        _tops_wide(source + 2 * channel, 2 * channels, tokens, tops + channel)
    for channel in range(whole, channels, GROUP):
        _tops_group(source + 2 * channel, 2 * channels, tokens, tops + channel)
    at = count // 8 * 11 + channels
    for token in range(tokens):
        following = ahead[token]
        for offset in range(2 * whole, nbytes, STRIPE):
            _fetch(following + offset)
        channel = 0
        while channel < channels:
            i = token * channels + channel
            if channel < whole:
                _fetch(following + 2 * channel)
                _fetch(following + 2 * channel + STRIPE)
                far = _code_wide(
                    source + 2 * i, tops + channel, target + i, low + i // 4, high + i // 8
                )
                channel += WIDE
            else:
                far = _code_group(
                    source + 2 * i, tops + channel, target + i, low + i // 4, high + i // 8
                )
                channel += GROUP
            # The first without a branch, which would be guessed wrong in every other vector. What
            # is no escape is read from the slack of an array, and written over later.
            for _ in range(COMMON):
                coded[min(at, size)] = words[i + _trailing_zeros(far)] >> 7
                at += far != 0
                far &= far - 1
            while far != 0:
                coded[min(at, size)] = words[i + _trailing_zeros(far)] >> 7
                at += 1
                far &= far - 1
    coded[at:size] = 0
    return at <= size


@register_jitable
def _put_escape(coded: Any, words: Any, i: int, at: int) -> None:
    sign_and_mantissa = np.uint16(coded[i])
    exponent = np.uint16(coded[at])
    words[i] = (sign_and_mantissa & 128) << 8 | exponent << 7 | sign_and_mantissa & 127


@register_jitable
def _decode_tile(coded: Any, words: Any, tokens: int, channels: int, size: int) -> None:
    """Decode coded[:size] to words[tokens * channels]."""
    count = tokens * channels
    source, target = coded.ctypes.data, words.ctypes.data
    low, high, tops = source + count, source + count // 4 * 5, source + count // 8 * 11
    whole = channels - channels % WIDE
    coded[size] = 0  # the exponent of escapes that have no room: no coder has written those bytes
    at = count // 8 * 11 + channels
    for token in range(tokens):
        channel = 0
        while channel < channels:
            i = token * channels + channel
            if channel < whole:
                far = _decode_wide(
                    target + 2 * i, tops + channel, source + i, low + i // 4, high + i // 8
                )
                channel += WIDE
            else:
                far = _decode_group(
                    target + 2 * i, tops + channel, source + i, low + i // 4, high + i // 8
                )
                channel += GROUP
            for _ in range(COMMON):  # what is no escape goes where the next vectors will be
                _put_escape(coded, words, i + _trailing_zeros(far), min(at, size))
                at += far != 0
                far &= far - 1
            while far != 0:
                _put_escape(coded, words, i + _trailing_zeros(far), min(at, size))
                at += 1
                far &= far - 1


@register_jitable
def _token(row: Any, offsets: Any, n: int, token: int) -> int:
    """Return where a token's first element lies in the cache."""
    unit = token if offsets.shape[2] > 1 else 0
    return int(row[0] + offsets[row[1], n, unit] + token * row[2])


@register_jitable
def _place(row: Any, channel: int) -> int:
    """Return how far from a token's first element another one lies, in bytes."""
    head = channel // row[5]
    return int(head * row[3] + 2 * (channel - head * row[5]))


@register_jitable
def _look_ahead(row: Any, offsets: Any, n: int, tile: Any, ahead: Any) -> int:
    """Say where the rows of a tile lie, and return the bytes of each."""
    place = _place(row, tile[2])
    for token in range(tile[1]):
        ahead[token] = _token(row, offsets, n, tile[0] + token) + place
    ahead[tile[1] :] = ahead[0]
    return int(2 * tile[3])


@register_jitable
def _move_tile(
    row: Any,
    offsets: Any,
    n: int,
    tile: Any,
    words: int,
    heads: Any,
    gather: bool,
    stream: bool,
) -> None:
    """Copy a tile's rows between the cache and `words`, [tokens, channels] at an address.

    Of `heads`, first and last, alone: the cache has no others.
    """
    apart = row[3] != 2 * row[5]  # heads that lie apart are copied one by one
    skip = heads[0] * row[5]  # channels
    first, end = max(tile[2], skip), min(tile[2] + tile[3], heads[1] * row[5])
    place = _place(row, first - skip)
    for token in range(tile[1]):
        start = _token(row, offsets, n, tile[0] + token)
        channel, count = first, end - first
        at = words + 2 * (token * tile[3] + first - tile[2])
        while channel < end:
            if apart:
                place = _place(row, channel - skip)
                count = min(row[5] - channel % row[5], end - channel)
            cache = start + place
            if gather:
                native._copy(cache, at, 2 * count)
            elif stream and (cache | 2 * count) % STRIPE == 0:
                for line in range(0, 2 * count, STRIPE):
                    _stream_line(at + line, cache + line)
            else:
                native._copy(at, cache, 2 * count)
            at += 2 * count
            channel += count


@register_jitable
def _hash_tile(
    acc: int, source: int, target: int, stripe: int, count: int, last: bool, stream: bool
) -> None:
    """Copy and hash `count` stripes, the first of them number `stripe` of its segment."""
    following = source + count * STRIPE
    count -= last
    native._stripes(acc, source, target, stripe, count, following, stream)
    if last:
        at = count * STRIPE
        if stream and target % STRIPE == 0:
            native._stream_stripe(acc, source + at, target + at, LAST_SECRET)
        else:
            native._copy_stripe(acc, source + at, target + at, LAST_SECRET)


@register_jitable
def _segment(
    components: Any,
    offsets: Any,
    segment: Any,
    tiles: Any,
    plans: Any,
    n: int,
    payload: int,
    following: Any,
    scratch: Any,
    heads: Any,
    encode: bool,
    stream: bool,
) -> Any:
    """Code and hash one segment of block n; return (low, high, whether all escapes had room).

    `following` is the block that the caller will code next, and its first component. Tiles without
    a channel of `heads`, first and last, are hashed only.
    """
    acc, words, coded, ahead = scratch
    acc[:] = START
    state = acc.ctypes.data
    stripe, stripes, fits = 0, segment[3] // STRIPE, True
    end = segment[0] + segment[1]
    for c in range(segment[0], end):
        row, first, last = components[c], plans[c, 0], plans[c, 0] + plans[c, 1]
        for i in range(first, last):
            tile = tiles[i]
            frame, count = payload + row[7] + tile[4], tile[5] // STRIPE
            final = stripe + count == stripes
            if encode:
                if i + 1 < last:
                    nbytes = _look_ahead(row, offsets, n, tiles[i + 1], ahead)
                else:
                    m, d = (n, c + 1) if c + 1 < end else following
                    nbytes = _look_ahead(components[d], offsets, m, tiles[plans[d, 0]], ahead)
                _move_tile(row, offsets, n, tile, words.ctypes.data, heads, True, False)
                fits &= _code_tile(words, coded, tile[1], tile[3], tile[5], ahead, nbytes)
                _hash_tile(state, coded.ctypes.data, frame, stripe, count, final, stream)
            else:
                _hash_tile(state, frame, coded.ctypes.data, stripe, count, final, False)
                first_channel, last_channel = heads[0] * row[5], heads[1] * row[5]
                if tile[2] < last_channel and tile[2] + tile[3] > first_channel:
                    _decode_tile(coded, words, tile[1], tile[3], tile[5])
                    _move_tile(row, offsets, n, tile, words.ctypes.data, heads, False, stream)
            stripe += count
    low, high = native._finish(acc, segment[3])
    return low, high, fits


@register_jitable
def _scratch(stamp: int) -> Any:
    """Return memory for a hash's state, a tile's words, its coded bytes, and addresses of rows."""
    whole = np.empty(2 * TILE_NBYTES + STRIPE, np.uint8)
    skip = -whole.ctypes.data % STRIPE  # to the begin of a cache line
    words = whole[skip : skip + TILE_NBYTES].view(np.uint16)
    ahead = np.empty(TOKENS_MAX, np.int64)
    return np.full(8, stamp, np.uint64), words, whole[skip + TILE_NBYTES :], ahead


_TABLES = (
    *native._TABLES,
    native._table(types.int64, 2),
    native._table(types.int64, 2),
    *native._RANGES,
)
_DIGESTS, _VERDICTS = native._table(types.uint64, 3), native._table(types.uint8, 2, False)


def _entries(stamp: int) -> Any:
    """Compile what is called from outside.

    numba's cache looks at the age of this file only, and at what a function encloses: `stamp`, so
    that code of native.py is compiled again when that file changes.
    """

    @native._compiled(
        types.void(*_TABLES, native._table(types.uint64, 3, False), _VERDICTS, types.boolean)
    )
    def encode(
        components: Any,
        offsets: Any,
        segments: Any,
        frames: Any,
        tiles: Any,
        plans: Any,
        first_block: int,
        last_block: int,
        first_segment: int,
        last_segment: int,
        digests: Any,
        verdicts: Any,
        stream: bool,
    ) -> None:
        scratch = _scratch(stamp)
        for n in range(first_block, last_block):
            for s in range(first_segment, last_segment):
                m, t = (n, s + 1) if s + 1 < last_segment else (n + 1, first_segment)
                following = (min(m, last_block - 1), segments[t, 0])
                low, high, fits = _segment(
                    components,
                    offsets,
                    segments[s],
                    tiles,
                    plans,
                    n,
                    frames[n],
                    following,
                    scratch,
                    (0, HEADS_MAX),
                    True,
                    stream,
                )
                digests[n, s, 0] = low
                digests[n, s, 1] = high
                verdicts[n, s] = GOOD if fits else OVERFULL
        native._fence()

    @native._compiled(
        types.void(*_TABLES, _DIGESTS, _VERDICTS, types.boolean, types.int64, types.int64)
    )
    def decode(
        components: Any,
        offsets: Any,
        segments: Any,
        frames: Any,
        tiles: Any,
        plans: Any,
        first_block: int,
        last_block: int,
        first_segment: int,
        last_segment: int,
        digests: Any,
        verdicts: Any,
        stream: bool,
        first_head: int,
        last_head: int,
    ) -> None:
        scratch = _scratch(stamp)
        for n in range(first_block, last_block):
            for s in range(first_segment, last_segment):
                low, high, _ = _segment(
                    components,
                    offsets,
                    segments[s],
                    tiles,
                    plans,
                    n,
                    frames[n],
                    (n, 0),
                    scratch,
                    (first_head, last_head),
                    False,
                    stream,
                )
                good = low == digests[n, s, 0] and high == digests[n, s, 1]
                verdicts[n, s] = GOOD if good else BAD
        native._fence()

    return encode, decode


encode, decode = _entries(zlib.crc32(Path(native.__file__).read_bytes()))
