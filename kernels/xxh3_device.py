"""xxh3-128 on a device: digests of segments while they are copied, and of spans where they lie.

The same digests as `digest.py` and `copy.py` give on the host, so a frame that one of them saved
the other verifies. The hash adds up what 16 stripes of 64 bytes give, scrambles the sum, and goes
on to the next KiB: sums of all KiB are independent of each other, so one kernel writes a row of 64
bytes for each KiB that it copies, and a second one, a row at a time, scrambles them together and
gives the digest, or the verdict on it: 9 % more bytes than the copy alone. Segments that do not fit
that (odd sizes, runs that end inside of 16 bytes) are copied and digested one after the other.

Algorithm: XXH3 128 bits, seed 0, default secret, long inputs (more than 240 bytes), of the xxHash
specification (doc/xxhash_spec.md, Cyan4973/xxHash). Imports triton, so it is imported on use only.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from kvengine.kernels import copy, device
from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Int64s, Moves, Span, expect
from kvengine.kernels.device import Ids
from kvengine.kernels.launch import Launcher, expect_memory, launcher

SHORT_NBYTES = 240  # has another form of the hash: the host's
KIB = 1024
STRIPE = 64
TILE_KIB = 16  # of a program: 4 warps, 16 bytes a thread, eight loads in flight for each
CHUNK_MIN = 16  # bytes of the finest pieces that are found one by one
SPANS = 16  # digested by a program: a thread for each word of a state
STEP = 8  # rows in flight for each thread

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = (
    0x00000000C2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x0000000085EBCA77,
    0x27D4EB2F165667C5,
    0x000000009E3779B1,
)
# Words of the constants that kernels read: the secret, then the parts of it that are taken from
# between its words, then the state that a hash begins with.
SCRAMBLE, LAST, LOW, HIGH, BEGIN = 16, 24, 32, 40, 48

_SCRAMBLE, _LAST = tl.constexpr(SCRAMBLE), tl.constexpr(LAST)
_LOW, _HIGH, _BEGIN = tl.constexpr(LOW), tl.constexpr(HIGH), tl.constexpr(BEGIN)
_PRIME_32 = tl.constexpr(0x9E3779B1)
_LOW_PRIME = tl.constexpr(0x9E3779B185EBCA87)
_HIGH_PRIME = tl.constexpr(0xC2B2AE3D27D4EB4F)
_AVALANCHE_PRIME = tl.constexpr(0x165667919E3779F9)
_GOOD, _BAD = tl.constexpr(copy.GOOD), tl.constexpr(copy.BAD)
_STEP = tl.constexpr(STEP)

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
_LOST = tl.constexpr(-(1 << 63))


@triton.jit
def _swapped(pairs, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Swap neighbours: uint64[N, 8]."""
    even, odd = pairs.reshape(N, 4, 2).split()
    return tl.join(odd, even).reshape(N, 8)


@triton.jit
def _sums(data, left, constants_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the stripes of each KiB: uint64[N, 16, 8] -> uint64[N, 8].

    left: int32[N, 16], bytes from the start of each stripe to the end of its segment. A whole
    stripe that ends the segment has a secret of its own; one that is cut short is left out.
    """
    lane = tl.arange(0, 8)
    stripe = tl.arange(0, 16)
    secret = tl.load(constants_ptr + stripe[:, None] + lane[None, :])
    last = tl.load(constants_ptr + _LAST + lane)
    ends = (left == 64)[:, :, None]
    counts = (left >= 64)[:, :, None]
    key = data ^ tl.where(ends, last[None, None, :], secret[None, :, :])
    product = (key & 0xFFFFFFFF) * (key >> 32)
    sums = tl.sum(tl.where(counts, product, 0), axis=1)
    return sums + _swapped(tl.sum(tl.where(counts, data, 0), axis=1), N)


@triton.jit
def copy_sums_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    components_ptr,  # int64[C, 11]
    places_ptr,  # int64[C, 3]: row of its first KiB, its nbytes, nbytes to its segment's end
    offsets_ptr,  # int64[G, N, U]
    frames_ptr,  # int64[N]
    constants_ptr,  # uint64[56]
    sums_ptr,  # uint64[blocks, rows, 8]
    first_block,
    first_component,
    count_blocks,  # N
    count_units,  # U
    rows,  # KiB of the segments here
    tiles,  # programs of a component of a block
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,  # bytes that divide every run
    TILE: tl.constexpr,  # KiB of a program
):
    CHUNKS: tl.constexpr = TILE * 1024 // CHUNK
    n = (first_block + tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    c = (first_component + tl.program_id(1)).to(tl.int64)
    row = components_ptr + c * _COLUMNS
    nbytes = tl.load(places_ptr + c * 3 + 1).to(tl.int32)
    left = tl.load(places_ptr + c * 3 + 2).to(tl.int32) - tile * (TILE * 1024)

    # where each chunk lies: the axes of a component tile its stretch of the frame
    at = tile * (TILE * 1024) + tl.arange(0, CHUNKS) * CHUNK  # [CHUNKS]
    inside = at < nbytes
    run = tl.load(row + _RUN).to(tl.int32)
    unit = tl.maximum(tl.load(row + _UNIT_FRAME).to(tl.int32), 1)  # a stride of 0 is of an axis
    outer = tl.maximum(tl.load(row + _OUTER_FRAME).to(tl.int32), 1)  # that has one entry
    inner = tl.maximum(tl.load(row + _INNER_FRAME).to(tl.int32), 1)
    u = at // unit % count_units
    a = (at // outer % tl.load(row + _OUTER).to(tl.int32)).to(tl.int64)
    b = (at // inner % tl.load(row + _INNER).to(tl.int32)).to(tl.int64)
    group = tl.load(row + _GROUP)
    offset = tl.load(
        offsets_ptr + (group * count_blocks + n) * count_units + u, mask=inside, other=0
    )
    known = inside & (offset != _LOST)
    cache = tl.load(row + _BASE) + offset + at % run
    cache += a * tl.load(row + _OUTER_CACHE) + b * tl.load(row + _INNER_CACHE)
    frame = tl.load(frames_ptr + n) + tl.load(row + _FRAME) + at

    word = tl.arange(0, CHUNK // 8)[None, :]
    kind: tl.constexpr = tl.pointer_type(tl.uint64)
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    cache_ptr = tl.multiple_of(cache[:, None].to(kind), [16, 16]) + word
    frame_ptr = tl.multiple_of(frame[:, None].to(kind), [16, 16]) + word
    if GATHER:  # a block that nobody knows is all zeros: every byte of a frame is written
        data = tl.load(cache_ptr, mask=known[:, None], other=0)
        tl.store(frame_ptr, data, mask=inside[:, None])
    else:
        data = tl.load(frame_ptr, mask=inside[:, None], other=0)
        tl.store(cache_ptr, data, mask=known[:, None])

    kib = tl.arange(0, TILE)
    lefts = left - kib[:, None] * 1024 - tl.arange(0, 16)[None, :] * 64
    sums = _sums(data.reshape(TILE, 16, 8), lefts, constants_ptr, TILE)
    block = (tl.program_id(0) // tiles).to(tl.int64)
    first = block * rows + tl.load(places_ptr + c * 3) + tile * TILE
    place = sums_ptr + (first + kib)[:, None] * 8 + tl.arange(0, 8)[None, :]
    wanted = tile * TILE + kib < (nbytes + 1023) // 1024
    tl.store(place, sums, mask=wanted[:, None])


@triton.jit
def span_sums_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    spans_ptr,  # int64[count, 3]: address, nbytes, row of its first KiB in sums
    constants_ptr,  # uint64[56]
    sums_ptr,  # uint64[rows, 8]
    tiles,  # programs of a span
    WIDE: tl.constexpr,  # every address is a multiple of 16
    TILE: tl.constexpr,  # KiB of a program
):
    span = spans_ptr + (tl.program_id(0) // tiles).to(tl.int64) * 3
    tile = tl.program_id(0) % tiles
    address = tl.load(span)
    nbytes = tl.load(span + 1).to(tl.int32)
    left = nbytes - tile * (TILE * 1024)
    if left > 0:
        kib = tl.arange(0, TILE)
        lane = tl.arange(0, 8)
        lefts = left - kib[:, None] * 1024 - tl.arange(0, 16)[None, :] * 64
        at = tile.to(tl.int64) * (TILE * 1024)
        data = _words(address + at, (lefts >= 64)[:, :, None], WIDE, TILE)
        sums = _sums(data, lefts, constants_ptr, TILE)
        if nbytes % 64 != 0:  # the last stripe lies across two: it is read by itself
            word = tl.zeros([8], tl.uint64)
            byte_ptr = (address + nbytes - 64).to(tl.pointer_type(tl.uint8)) + lane * 8
            for i in tl.static_range(8):
                word |= tl.load(byte_ptr + i).to(tl.uint64) << (8 * i)
            key = word ^ tl.load(constants_ptr + _LAST + lane)
            given = (key & 0xFFFFFFFF) * (key >> 32)
            given = given[None, :] + _swapped(word[None, :], 1)
            here = kib == (left - 1) // 1024
            sums += tl.where(here[:, None], given, 0)
        first = tl.load(span + 2) + tile * TILE
        place = sums_ptr + (first + kib)[:, None] * 8 + lane[None, :]
        tl.store(place, sums, mask=(kib < (left + 1023) // 1024)[:, None])


@triton.jit
def _words(address, mask, WIDE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load uint64[TILE, 16, 8] at an address; zeros where mask does not hold."""
    kib = tl.arange(0, TILE)[:, None, None]
    stripe = tl.arange(0, 16)[None, :, None]
    place = kib * 128 + stripe * 8 + tl.arange(0, 8)[None, None, :]
    if WIDE:
        word_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
        return tl.load(word_ptr + place, mask=mask, other=0)
    else:
        byte_ptr = address.to(tl.pointer_type(tl.uint8)) + place * 8
        word = tl.load(byte_ptr, mask=mask, other=0).to(tl.uint64)
        for i in tl.static_range(1, 8):
            word |= tl.load(byte_ptr + i, mask=mask, other=0).to(tl.uint64) << (8 * i)
        return word


@triton.jit
def _merged(state, secret_ptr, start, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fold a state to one half of a digest: uint64[N, 8] -> uint64[N]."""
    key = state ^ tl.load(secret_ptr + tl.arange(0, 8))[None, :]
    left, right = key.reshape(N, 4, 2).split()
    value = start + tl.sum((left * right) ^ tl.umulhi(left, right), axis=1)
    value = (value ^ (value >> 37)) * _AVALANCHE_PRIME
    return value ^ (value >> 32)


@triton.jit
def fold_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    sums_ptr,  # uint64[blocks, rows, 8]
    segments_ptr,  # int64[segments, 2]: row of its first KiB, nbytes
    constants_ptr,  # uint64[56]
    digests_ptr,  # uint64[N, S, 2]: written, or compared with
    verdicts_ptr,  # uint8[N, S]
    count,  # blocks x segments
    count_segments,
    rows,  # KiB of the segments of a block
    steps,  # STEPs that the longest segment takes
    first_block,
    first_segment,
    all_segments,  # S
    VERIFY: tl.constexpr,
    SPANS: tl.constexpr,
):
    index = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    live = index < count
    n = (index // count_segments).to(tl.int64)
    s = index % count_segments
    lane = tl.arange(0, 8)
    row = tl.load(segments_ptr + s * 2, mask=live, other=0)
    nbytes = tl.load(segments_ptr + s * 2 + 1, mask=live, other=0)
    kibs = ((nbytes + 1023) // 1024).to(tl.int32)
    row_ptr = sums_ptr + (n * rows + row)[:, None] * 8 + lane[None, :]
    state = tl.load(constants_ptr + _BEGIN + lane)[None, :] + tl.zeros([SPANS, 8], tl.uint64)
    scramble = tl.load(constants_ptr + _SCRAMBLE + lane)[None, :]
    for step in range(steps):
        given = ()  # loads of several rows are in flight at once: only their use is in order
        for i in tl.static_range(_STEP):
            k = step * _STEP + i
            mask = (live & (k < kibs))[:, None]
            word = tl.load(row_ptr + k * 8, mask=mask, other=0)
            given = given + (word,)  # type: ignore[assignment]  # a tuple that grows
        for i in tl.static_range(_STEP):
            k = step * _STEP + i
            added = state + given[i]
            mixed = ((added ^ (added >> 47)) ^ scramble) * _PRIME_32
            state = tl.where((k < kibs)[:, None], added, state)
            state = tl.where((k < kibs - 1)[:, None], mixed, state)  # not after the last one
    size = nbytes.to(tl.uint64)
    low = _merged(state, constants_ptr + _LOW, size * _LOW_PRIME, SPANS)
    high = _merged(state, constants_ptr + _HIGH, ~(size * _HIGH_PRIME), SPANS)
    place = (first_block + n) * all_segments + first_segment + s
    if VERIFY:
        good = low == tl.load(digests_ptr + 2 * place, mask=live, other=0)
        good &= high == tl.load(digests_ptr + 2 * place + 1, mask=live, other=0)
        tl.store(verdicts_ptr + place, tl.where(good, _GOOD, _BAD).to(tl.uint8), mask=live)
    else:
        tl.store(digests_ptr + 2 * place, low, mask=live)
        tl.store(digests_ptr + 2 * place + 1, high, mask=live)


def gather(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: Any,
    device: str | Launcher,
    ids: Ids | None = None,
) -> None:
    """Copy cache -> frames, and write the digest of each segment, in the device's current stream.

    digests: uint64[N, S, 2] (int64 where torch has no other), device memory; only the ranges'
    rows are written. Otherwise as `device.gather`. Raises ValueError for segments of at most 240
    bytes.
    """
    _moved(moves, blocks, segments, digests, None, device, ids)


def scatter(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: Any,
    verdicts: Any,
    device: str | Launcher,
    ids: Ids | None = None,
) -> None:
    """Copy frames -> cache, and write a verdict on each segment: its status word, GOOD or BAD.

    verdicts: uint8[N, S], device memory. The bytes of a BAD segment are in the cache all the same,
    and are not to be used: read the verdict when the stream has passed the launches. Otherwise as
    `gather`.
    """
    _moved(moves, blocks, segments, digests, verdicts, device, ids)


def digest_spans(addresses: Int64s, nbytes: Int64s, out: Any, device: str | Launcher) -> None:
    """Write the digest of each span of memory to `out`, in the device's current stream.

    addresses, nbytes: int64[n], of memory that the device reaches; out: uint64[n, 2], (low, high),
    device memory. Raises ValueError for tables that do not fit and for spans of at most 240 bytes.
    """
    expect("addresses", addresses, np.int64, (len(nbytes),))
    expect("nbytes", nbytes, np.int64, (len(nbytes),))
    if not len(nbytes):
        return
    if int(nbytes.min()) <= SHORT_NBYTES:
        raise ValueError(_too_short(int(nbytes.min())))
    expect_memory("out", out, 8, 2 * len(nbytes))
    on = launcher(device)
    constants = on.table(CONSTANTS)
    sums, table = _span_sums(addresses, nbytes, on, constants)
    _fold(sums, table, on, constants, (0, 1), (0, len(nbytes)), len(nbytes), out, None)


def chunk_of(moves: Moves, ids: Ids | None = None) -> int:
    """Return the bytes of the pieces by which segments are copied and digested in one pass.

    0 where they cannot be: a table of a few heads, a segment that is no multiple of 64 bytes, a
    component that does not begin on a KiB of its segment, addresses that are no multiples of 16.
    """
    if not moves.whole or device.alignment(moves, ids) < CHUNK_MIN:
        return 0
    if (moves.segments[:, copy.NBYTES] % STRIPE).any():
        return 0
    for first, count, offset, _ in moves.segments.tolist():
        if ((moves.components[first : first + count, copy.FRAME] - offset) % KIB).any():
            return 0
    return math.gcd(KIB, *moves.components[:, copy.RUN].tolist())


def _moved(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: Any,
    verdicts: Any,
    where: str | Launcher,
    ids: Ids | None,
) -> None:
    chosen = moves.segments[slice(*segments)]
    if blocks[0] == blocks[1] or not len(chosen):
        return
    if int(chosen[:, copy.NBYTES].min()) <= SHORT_NBYTES:
        raise ValueError(_too_short(int(chosen[:, copy.NBYTES].min())))
    places = len(moves.frames) * len(moves.segments)
    expect_memory("digests", digests, 8, 2 * places)
    if verdicts is not None:
        expect_memory("verdicts", verdicts, 1, places)
    on = launcher(where)
    constants = on.table(CONSTANTS)
    gathers = verdicts is None
    chunk = chunk_of(moves, ids)
    if chunk:
        sums, table = _copied(moves, blocks, segments, on, ids, constants, gathers, chunk)
    else:
        if gathers:
            device.gather(moves, blocks, segments, on, ids)
        addresses = moves.frames[slice(*blocks), None] + chosen[:, copy.OFFSET]
        nbytes = np.tile(chosen[:, copy.NBYTES], len(addresses))
        sums, table = _span_sums(addresses.reshape(-1), nbytes, on, constants)
        if not gathers:
            device.scatter(moves, blocks, segments, on, ids)
    table = table[: len(chosen)]
    _fold(sums, table, on, constants, blocks, segments, len(moves.segments), digests, verdicts)


def _copied(
    moves: Moves,
    blocks: Span,
    segments: Span,
    on: Launcher,
    ids: Ids | None,
    constants: Any,
    gathers: bool,
    chunk: int,
) -> tuple[Any, Int64s]:
    """Launch the copy that adds up.

    Return the sums, uint64[blocks, rows, 8], and for each segment its first row and its nbytes.
    """
    _, count_blocks, count_units = moves.offsets.shape
    chosen = moves.segments[slice(*segments)]
    kibs = -(-chosen[:, copy.NBYTES] // KIB)
    starts = np.cumsum(kibs) - kibs
    places = np.zeros((len(moves.components), 3), np.int64)
    for (first, count, offset, nbytes), start in zip(chosen.tolist(), starts.tolist(), strict=True):
        at = moves.components[first : first + count, copy.FRAME] - offset
        places[first : first + count, 0] = start + at // KIB
        places[first : first + count, 1] = np.diff(at, append=nbytes)
        places[first : first + count, 2] = nbytes - at
    first = int(chosen[:, copy.FIRST].min())
    last = int((chosen[:, copy.FIRST] + chosen[:, copy.COUNT]).max())
    assert int(chosen[:, copy.COUNT].sum()) == last - first  # one stretch of components
    assert int(places.max()) < 1 << 31
    tiles = triton.cdiv(int(places[:, 1].max()), TILE_KIB * KIB)
    rows = int(kibs.sum())
    sums = on.empty((blocks[1] - blocks[0], rows, 8), np.uint64)
    tables = (
        on.table(moves.components),
        on.table(places),
        on.table(moves.offsets) if ids is None else ids.offsets(moves, on),
        on.table(moves.frames),
    )
    on.run(
        copy_sums_kernel,
        ((blocks[1] - blocks[0]) * tiles, last - first),
        (*tables, constants, sums, blocks[0], first, count_blocks, count_units, rows, tiles),
        {"GATHER": gathers, "CHUNK": chunk, "TILE": TILE_KIB},
    )
    return sums, np.stack([starts, chosen[:, copy.NBYTES]], axis=1)


def _span_sums(
    addresses: Int64s, nbytes: Int64s, on: Launcher, constants: Any
) -> tuple[Any, Int64s]:
    """Add up spans where they lie.

    Return the sums, uint64[rows, 8], and for each span its first row and its nbytes.
    """
    kibs = -(-nbytes // KIB)
    starts = np.cumsum(kibs) - kibs
    assert int(nbytes.max()) < 1 << 31
    tiles = triton.cdiv(int(kibs.max()), TILE_KIB)
    sums = on.empty((int(kibs.sum()), 8), np.uint64)
    on.run(
        span_sums_kernel,
        (len(nbytes) * tiles,),
        (on.table(np.stack([addresses, nbytes, starts], axis=1)), constants, sums, tiles),
        {"WIDE": not (addresses % 16).any(), "TILE": TILE_KIB},
    )
    return sums, np.stack([starts, nbytes], axis=1)


def _fold(
    sums: Any,
    table: Int64s,
    on: Launcher,
    constants: Any,
    blocks: Span,
    segments: Span,
    all_segments: int,
    digests: Any,
    verdicts: Any,
) -> None:
    kibs = -(-table[:, 1] // KIB)
    count = (blocks[1] - blocks[0]) * len(table)
    on.run(
        fold_kernel,
        (triton.cdiv(count, SPANS),),
        (
            sums,
            on.table(table),
            constants,
            digests,
            digests if verdicts is None else verdicts,
            count,
            len(table),
            int(kibs.sum()),
            triton.cdiv(int(kibs.max()), STEP),
            blocks[0],
            segments[0],
            all_segments,
        ),
        {"VERIFY": verdicts is not None, "SPANS": SPANS},
    )


def _too_short(nbytes: int) -> str:
    return (
        f"a segment of {nbytes} bytes has another form of the hash than those of more than "
        f"{SHORT_NBYTES}: digest it on the host, with kvengine.kernels.digest"
    )


def _constants() -> npt.NDArray[np.uint64]:
    def at(offset: int) -> tuple[int, ...]:
        return tuple(np.frombuffer(SECRET, np.uint64, 8, offset).tolist())

    secret = np.frombuffer(SECRET, np.uint64).tolist()
    # 121 = 192 - 64 - 7, and 117 = 192 - 64 - 11
    return np.array([*secret, *at(121), *at(11), *at(117), *START], np.uint64)


CONSTANTS = _constants()
_COPIED = {
    "components_ptr": "*i64",
    "places_ptr": "*i64",
    "offsets_ptr": "*i64",
    "frames_ptr": "*i64",
    "constants_ptr": "*u64",
    "sums_ptr": "*u64",
}
_SPANS = {"spans_ptr": "*i64", "constants_ptr": "*u64", "sums_ptr": "*u64"}
_FOLDED = {
    "sums_ptr": "*u64",
    "segments_ptr": "*i64",
    "constants_ptr": "*u64",
    "digests_ptr": "*u64",
    "verdicts_ptr": "*u8",
}
_COUNTS = ("first_block", "first_component", "count_blocks", "count_units", "rows", "tiles")
_PLACES = ("first_block", "first_segment", "all_segments")
VARIANTS = (
    *(
        Variant(
            f"{verb} and digest {what}",
            copy_sums_kernel,
            signature=_COPIED | dict.fromkeys(_COUNTS, "i32"),
            constants={"GATHER": verb == "gather", "CHUNK": chunk, "TILE": TILE_KIB},
            aligned=tuple(_COPIED),
            elements=TILE_KIB * KIB // 2,
            registers_max=128,  # four programs of 4 warps on a multiprocessor
        )
        for verb in ("gather", "scatter")
        for what, chunk in (("blocks", KIB), ("heads", 256))
    ),
    *(
        Variant(
            f"digest spans {'of any address' if bits == 8 else 'by 16 bytes'}",
            span_sums_kernel,
            signature=_SPANS | {"tiles": "i32"},
            constants={"WIDE": bits == 128, "TILE": TILE_KIB},
            aligned=tuple(_SPANS),
            elements=TILE_KIB * KIB // 2,
            load_bits=bits,
            store_bits=64,
            registers_max=128,
        )
        for bits in (128, 8)
    ),
    *(
        Variant(
            f"fold to {what}",
            fold_kernel,
            signature=_FOLDED
            | dict.fromkeys(("count", "count_segments", "rows", "steps"), "i32")
            | dict.fromkeys(_PLACES, "i32"),
            constants={"VERIFY": what == "verdicts", "SPANS": SPANS},
            aligned=tuple(_FOLDED),
            load_bits=64,  # a thread for each word
            store_bits=8 if what == "verdicts" else 64,
            registers_max=96,
        )
        for what in ("digests", "verdicts")
    ),
)
