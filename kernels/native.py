"""The CPU fast path: copy and xxh3-128 in one pass over the bytes, compiled by numba.

Imported only through `kvengine.kernels.launch.native`, on first use. All compiled code is in this
one file because numba's cache looks at the age of one file only. Every function takes raw
addresses and holds no GIL.

Algorithm: XXH3 128 bits, seed 0, default secret, of the xxHash specification (doc/xxhash_spec.md,
Cyan4973/xxHash), its long-input form: segments of up to `SHORT_NBYTES` are the caller's.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as typed_cgutils
from numba.extending import intrinsic as typed_intrinsic
from numba.extending import register_jitable

# numba annotates a part of itself, and an intrinsic as the function that makes its code
cgutils: Any = typed_cgutils
intrinsic: Any = typed_intrinsic

SHORT_NBYTES = 240

STRIPE = 64  # bytes hashed by one step
STRIPES = 16  # steps of a block of the hash: (192 - 64) / 8
BLOCK = STRIPE * STRIPES
LAST_SECRET = 121  # 192 - 64 - 7
BAD = np.uint8(2)
GOOD = np.uint8(1)

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = np.array(
    [
        0xC2B2AE3D,
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x85EBCA77,
        0x27D4EB2F165667C5,
        0x9E3779B1,
    ],
    dtype=np.uint64,
)
LOW_SECRET = np.frombuffer(SECRET, np.uint64, 8, 11)
HIGH_SECRET = np.frombuffer(SECRET, np.uint64, 8, 117)  # 192 - 64 - 11
LOW_PRIME = np.uint64(0x9E3779B185EBCA87)
HIGH_PRIME = np.uint64(0xC2B2AE3D27D4EB4F)
AVALANCHE_PRIME = np.uint64(0x165667919E3779F9)

I64 = ir.IntType(64)
LANES = ir.VectorType(I64, 8)
AHEAD = 4096  # bytes fetched before they are read: the processor's own prefetch ends with a page
HASH, COPY, STREAM = range(3)  # what happens to a stripe besides being hashed


def _lanes(value: int) -> ir.Constant:
    return ir.Constant(LANES, [value] * 8)


def _secret(offset: int) -> ir.Constant:
    return ir.Constant(LANES, [int(word) for word in np.frombuffer(SECRET, np.uint64, 8, offset)])


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, LANES.as_pointer())


def _accumulate(builder: ir.IRBuilder, acc: ir.Value, data: ir.Value, secret: ir.Value) -> ir.Value:
    key = builder.xor(data, secret)
    low = builder.and_(key, _lanes(0xFFFFFFFF))
    product = builder.mul(low, builder.lshr(key, _lanes(32)))
    swap = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    return builder.add(acc, builder.add(product, builder.shuffle_vector(data, data, swap)))


def _scramble(builder: ir.IRBuilder, acc: ir.Value) -> ir.Value:
    acc = builder.xor(acc, builder.lshr(acc, _lanes(47)))
    return builder.mul(builder.xor(acc, _secret(128)), _lanes(0x9E3779B1))


def _store(builder: ir.IRBuilder, data: ir.Value, address: ir.Value, kind: int) -> None:
    if kind == COPY:
        builder.store(data, _pointer(builder, address), align=1)
    if kind == STREAM:  # past the caches: the line is not read first. The address is aligned
        stored = builder.store(data, _pointer(builder, address), align=STRIPE)
        one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        stored.set_metadata("nontemporal", one)


def _prefetch(builder: ir.IRBuilder, address: ir.Value, kind: int) -> None:
    # What is streamed is read once: it leaves the caches to those who come back to them.
    locality = 0 if kind == STREAM else 3
    i32 = ir.IntType(32)
    pointer = builder.inttoptr(address, cgutils.voidptr_t)
    signature = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
    prefetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    builder.call(prefetch, [pointer, i32(0), i32(locality), i32(1)])


def _blocks(kind: int) -> Any:
    """Return the intrinsic (acc, source, target, count, ahead): hash `count` x 1024 bytes.

    Store them as `kind` says, and fetch as many from `ahead` into the caches.
    """

    @intrinsic
    def blocks(typing: Any, acc: Any, source: Any, target: Any, count: Any, ahead: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            acc, source, target, count, ahead = args
            saved = _pointer(builder, acc)
            state = cgutils.alloca_once_value(builder, builder.load(saved, align=8))
            with cgutils.for_range(builder, count) as loop:
                base = builder.mul(loop.index, ir.Constant(I64, STRIPE * STRIPES))
                value = builder.load(state)
                for index in range(STRIPES):
                    offset = builder.add(base, ir.Constant(I64, index * STRIPE))
                    _prefetch(builder, builder.add(ahead, offset), kind)
                    data = builder.load(_pointer(builder, builder.add(source, offset)), align=1)
                    _store(builder, data, builder.add(target, offset), kind)
                    value = _accumulate(builder, value, data, _secret(8 * index))
                builder.store(_scramble(builder, value), state)
            builder.store(builder.load(state), saved, align=8)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return blocks


def _stripe(kind: int) -> Any:
    """Return the intrinsic (acc, source, target, secret offset): hash 64 bytes and store them."""

    @intrinsic
    def stripe(typing: Any, acc: Any, source: Any, target: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            acc, source, target, offset = args
            saved = _pointer(builder, acc)
            data = builder.load(_pointer(builder, source), align=1)
            _store(builder, data, target, kind)
            text = ir.Constant(ir.ArrayType(ir.IntType(8), len(SECRET)), bytearray(SECRET))
            table = cgutils.global_constant(builder, "xxh3_secret", text)
            key_address = builder.add(builder.ptrtoint(table, I64), offset)
            key = builder.load(_pointer(builder, key_address), align=1)
            value = _accumulate(builder, builder.load(saved, align=8), data, key)
            builder.store(value, saved, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return stripe


_hash_blocks, _copy_blocks, _stream_blocks = _blocks(HASH), _blocks(COPY), _blocks(STREAM)
_hash_stripe, _copy_stripe, _stream_stripe = _stripe(HASH), _stripe(COPY), _stripe(STREAM)


@intrinsic
def _end_block(typing: Any, acc: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        saved = _pointer(builder, args[0])
        builder.store(_scramble(builder, builder.load(saved, align=8)), saved, align=8)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _copy(typing: Any, source: Any, target: Any, nbytes: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        source, target = (builder.inttoptr(a, cgutils.voidptr_t) for a in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _fence(typing: Any) -> Any:
    """Order the streamed stores before whatever the caller does next."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _fold(typing: Any, left: Any, right: Any) -> Any:
    """Multiply to 128 bits and fold the halves by xor."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        high = builder.lshr(product, ir.Constant(wide, 64))
        return builder.trunc(builder.xor(product, high), I64)

    return types.uint64(types.uint64, types.uint64), codegen


@register_jitable
def _merge(acc: Any, secret: Any, start: Any) -> Any:
    for i in range(0, 8, 2):
        start += _fold(acc[i] ^ secret[i], acc[i + 1] ^ secret[i + 1])
    start ^= start >> np.uint64(37)
    start *= AVALANCHE_PRIME
    return start ^ (start >> np.uint64(32))


@register_jitable
def _finish(acc: Any, nbytes: int) -> Any:
    """Return (low, high) of a span of `nbytes` bytes, all hashed."""
    size = np.uint64(nbytes)
    low = _merge(acc, LOW_SECRET, size * LOW_PRIME)
    return low, _merge(acc, HIGH_SECRET, ~(size * HIGH_PRIME))


@register_jitable
def _stripes(
    acc: int, source: int, target: int, first: int, count: int, following: int, stream: bool
) -> None:
    """Hash stripes first .. first + count of a segment and copy them (target 0: hash only).

    `following` is where the caller will read next: its head is fetched while the end is copied.
    """
    while count > 0:
        index = first % STRIPES
        if index == 0 and count >= STRIPES:
            blocks = count // STRIPES
            ahead = source + AHEAD
            if blocks > AHEAD // BLOCK:
                blocks -= AHEAD // BLOCK
            else:
                ahead = following
            step = blocks * STRIPES
            if target == 0:
                _hash_blocks(acc, source, target, blocks, ahead)
            elif stream and target % STRIPE == 0:
                _stream_blocks(acc, source, target, blocks, ahead)
            else:
                _copy_blocks(acc, source, target, blocks, ahead)
        else:
            step = min(count, STRIPES - index)
            for i in range(step):
                at = STRIPE * i
                if target == 0:
                    _hash_stripe(acc, source + at, 0, 8 * (index + i))
                elif stream and target % STRIPE == 0:
                    _stream_stripe(acc, source + at, target + at, 8 * (index + i))
                else:
                    _copy_stripe(acc, source + at, target + at, 8 * (index + i))
            if index + step == STRIPES:
                _end_block(acc)
        first += step
        count -= step
        source += step * STRIPE
        if target != 0:
            target += step * STRIPE


@register_jitable
def _move(
    acc: int,
    cache: int,
    frame: int,
    at: int,
    nbytes: int,
    total: int,
    following: int,
    gather: bool,
    stream: bool,
) -> bool:
    """Copy `nbytes` at byte `at` of a segment of `total` bytes that starts at address `frame`.

    Hash each stripe that is complete after it; a stripe that lies in several runs is read back
    from the frame. Return whether the last stripe of the segment was hashed too.
    """
    stripes = (total - 1) // STRIPE
    source, target = (cache, frame + at) if gather else (frame + at, cache)
    head = min(-at % STRIPE, nbytes)
    if head > 0:
        _copy(source, target, head)
        index = at // STRIPE
        if (at + head) % STRIPE == 0 and index < stripes:
            _stripes(acc, frame + index * STRIPE, 0, index, 1, 0, False)
    first = (at + head) // STRIPE
    count = max(min((nbytes - head) // STRIPE, stripes - first), 0)
    _stripes(acc, source + head, target + head, first, count, following, stream)
    done = head + count * STRIPE
    if stream and nbytes - done == STRIPE and (target + done) % STRIPE == 0:
        if at + nbytes == total:  # a plain store here would hold up the streamed ones behind it
            _stream_stripe(acc, source + done, target + done, LAST_SECRET)
            return True
    if done < nbytes:
        _copy(source + done, target + done, nbytes - done)
    return False


@register_jitable
def _segment(
    components: Any,
    offsets: Any,
    segment: Any,
    n: int,
    payload: int,
    following: int,
    acc: Any,
    gather: bool,
    stream: bool,
) -> Any:
    """Copy and hash one segment of block n, in the order of the frame; return (low, high)."""
    acc[:] = START
    state = acc.ctypes.data
    frame, total = payload + segment[2], segment[3]
    at = 0
    cache, nbytes = 0, 0  # runs that touch each other in the cache are moved as one
    for c in range(segment[0], segment[0] + segment[1]):
        row = components[c]
        group, run = row[1], row[8]
        # the three axes by their stride in the frame: (stride, count, cache stride, unit stride)
        x = (row[9], offsets.shape[2], 0, 1)
        y = (row[4], row[2], row[3], 0)
        z = (row[7], row[5], row[6], 0)
        if y[0] < z[0]:
            y, z = z, y
        if x[0] < y[0]:
            x, y = y, x
            if y[0] < z[0]:
                y, z = z, y
        for i in range(x[1]):
            for j in range(y[1]):
                for k in range(z[1]):
                    u = i * x[3] + j * y[3] + k * z[3]
                    next = row[0] + offsets[group, n, u] + i * x[2] + j * y[2] + k * z[2]
                    if next == cache + nbytes:
                        nbytes += run
                    else:
                        if nbytes > 0:
                            ahead = next if gather else frame + at + nbytes
                            _move(state, cache, frame, at, nbytes, total, ahead, gather, stream)
                            at += nbytes
                        cache, nbytes = next, run
    if not _move(state, cache, frame, at, nbytes, total, following, gather, stream):
        tail = frame + total - STRIPE
        if gather and nbytes >= STRIPE:  # a streamed line would have to come back from memory
            tail = cache + nbytes - STRIPE
        _hash_stripe(state, tail, 0, LAST_SECRET)
    return _finish(acc, total)


def _compiled(signature: Any) -> Callable[[Any], Any]:
    def compile(function: Any) -> Any:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no directory for the cache, or no room in it
            return numba.njit(signature, nogil=True)(function)

    return compile


def _table(item: Any, ndim: int, readonly: bool = True) -> Any:
    return types.Array(item, ndim, "C", readonly=readonly)


_TABLES = (
    _table(types.int64, 2),
    _table(types.int64, 3),
    _table(types.int64, 2),
    _table(types.int64, 1),
)
_RANGES = (types.int64,) * 4


@_compiled(types.void(*_TABLES, *_RANGES, _table(types.uint64, 3, False), types.boolean))
def gather(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    first_block: int,
    last_block: int,
    first_segment: int,
    last_segment: int,
    digests: Any,
    stream: bool,
) -> None:
    """Copy cache -> frames, and write the digest of each segment: see `copy.gather`."""
    acc = np.empty(8, np.uint64)
    for n in range(first_block, last_block):
        for s in range(first_segment, last_segment):
            m, t = (n, s + 1) if s + 1 < last_segment else (n + 1, first_segment)
            following = frames[n]
            if m < last_block:
                first = components[segments[t, 0]]
                following = first[0] + offsets[first[1], m, 0]
            low, high = _segment(
                components, offsets, segments[s], n, frames[n], following, acc, True, stream
            )
            digests[n, s, 0] = low
            digests[n, s, 1] = high
    _fence()


@_compiled(
    types.void(
        *_TABLES, *_RANGES, _table(types.uint64, 3), _table(types.uint8, 2, False), types.boolean
    )
)
def scatter(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    first_block: int,
    last_block: int,
    first_segment: int,
    last_segment: int,
    digests: Any,
    verdicts: Any,
    stream: bool,
) -> None:
    """Copy frames -> cache, and write the verdict on each segment: see `copy.scatter`."""
    acc = np.empty(8, np.uint64)
    for n in range(first_block, last_block):
        for s in range(first_segment, last_segment):
            m, t = (n, s + 1) if s + 1 < last_segment else (n + 1, first_segment)
            following = frames[n]
            if m < last_block:
                following = frames[m] + segments[t, 2]
            low, high = _segment(
                components, offsets, segments[s], n, frames[n], following, acc, False, stream
            )
            good = low == digests[n, s, 0] and high == digests[n, s, 1]
            verdicts[n, s] = GOOD if good else BAD
    _fence()


@register_jitable
def _span(acc: Any, address: int, nbytes: int, following: int) -> Any:
    """Return the digest (low, high) of a span of more than SHORT_NBYTES bytes."""
    acc[:] = START
    stripes = (nbytes - 1) // STRIPE
    _stripes(acc.ctypes.data, address, 0, 0, stripes, following, False)
    _hash_stripe(acc.ctypes.data, address + nbytes - STRIPE, 0, LAST_SECRET)
    return _finish(acc, nbytes)


@_compiled(types.void(*_TABLES, *_RANGES, _table(types.uint64, 3), _table(types.uint8, 2, False)))
def scatter_some(
    components: Any,
    offsets: Any,
    segments: Any,
    frames: Any,
    first_block: int,
    last_block: int,
    first_segment: int,
    last_segment: int,
    digests: Any,
    verdicts: Any,
) -> None:
    """Do what `scatter` does, where components do not cover their segments: verify, then copy."""
    acc = np.empty(8, np.uint64)
    for n in range(first_block, last_block):
        for s in range(first_segment, last_segment):
            segment, payload = segments[s], frames[n]
            start = payload + segment[2]
            low, high = _span(acc, start, segment[3], start)
            good = low == digests[n, s, 0] and high == digests[n, s, 1]
            verdicts[n, s] = GOOD if good else BAD
            for c in range(segment[0], segment[0] + segment[1] if good else segment[0]):
                row = components[c]
                for u in range(offsets.shape[2]):
                    cache = row[0] + offsets[row[1], n, u]
                    frame = payload + row[10] + u * row[9]
                    for a in range(row[2]):
                        for b in range(row[5]):
                            source = frame + a * row[4] + b * row[7]
                            _copy(source, cache + a * row[3] + b * row[6], row[8])


@_compiled(
    types.void(_table(types.int64, 1), _table(types.int64, 1), _table(types.uint64, 2, False))
)
def digest(addresses: Any, nbytes: Any, out: Any) -> None:
    """Write the digest (low, high) of each span of more than SHORT_NBYTES bytes."""
    acc = np.empty(8, np.uint64)
    for i in range(len(addresses)):
        if nbytes[i] > SHORT_NBYTES:
            following = addresses[min(i + 1, len(addresses) - 1)]
            low, high = _span(acc, addresses[i], nbytes[i], following)
            out[i, 0] = low
            out[i, 1] = high


@_compiled(types.void(_table(types.int64, 1), _table(types.int64, 1), _table(types.int64, 1)))
def copy_spans(sources: Any, targets: Any, nbytes: Any) -> None:
    """Copy spans of memory, one after the other: see `copy.copy_spans`."""
    for i in range(len(nbytes)):
        _copy(sources[i], targets[i], nbytes[i])
