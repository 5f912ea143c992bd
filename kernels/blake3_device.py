"""BLAKE3 on a device: hashes of many scattered messages at once, and the keys of token blocks.

A lane hashes a chunk of 1024 bytes; a second kernel folds the chunks of each message, a level of
its tree at a time. Messages lie in segments whose addresses a table gives, so paged memory is
hashed where it is. The same hashes as the `blake3` package gives, plain and keyed, and the same
keys as `kvengine.keys`: `leaf = BLAKE3(tokens)`, `key = BLAKE3_keyed(root, parent ‖ leaf)`; leaves
in parallel, chains of several prompts beside each other.

Algorithm: the BLAKE3 specification (hash and keyed_hash modes). Imports triton, so it is imported
on use only. The reference, and the fast path of a host, are the functions of the same names in
`digest.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl

from kvengine.kernels.build import Variant
from kvengine.kernels.copy import Int64s, expect
from kvengine.kernels.launch import Launcher, expect_memory, launcher

CHUNK = 1024
BLOCK = 64  # bytes of a compression
WORD = 4
KEY_BYTES = 32
IV = (
    0x6A09E667,
    0xBB67AE85,
    0x3C6EF372,
    0xA54FF53A,
    0x510E527F,
    0x9B05688C,
    0x1F83D9AB,
    0x5BE0CD19,
)
KEYED = 16  # a flag of every compression

LANES = 32  # of a program: one warp, so that the exchange of words needs no barrier
FOLD_LANES = 128

_IV_0, _IV_1, _IV_2, _IV_3 = (tl.constexpr(word) for word in IV[:4])
_START, _END, _PARENT, _ROOT = (tl.constexpr(flag) for flag in (1, 2, 4, 8))
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _rotr(x, n: tl.constexpr):  # type: ignore[no-untyped-def]
    return (x >> n) | (x << (32 - n))


@triton.jit
def _mix(a, b, c, d, x, y):
    a = a + b + x
    d = _rotr(d ^ a, 16)
    c = c + d
    b = _rotr(b ^ c, 12)
    a = a + b + y
    d = _rotr(d ^ a, 8)
    c = c + d
    b = _rotr(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _compress(h, m, counter, length, flags):
    """Compress lane by lane: h, 8 words, and m, 16 words, give the 8 words of a value."""
    zero = counter & 0
    v0, v1, v2, v3, v4, v5, v6, v7 = h
    v8, v9, v10, v11 = zero + _IV_0, zero + _IV_1, zero + _IV_2, zero + _IV_3
    v12, v13, v14, v15 = counter, zero, zero + length, zero + flags
    for _ in tl.static_range(7):
        v0, v4, v8, v12 = _mix(v0, v4, v8, v12, m[0], m[1])
        v1, v5, v9, v13 = _mix(v1, v5, v9, v13, m[2], m[3])
        v2, v6, v10, v14 = _mix(v2, v6, v10, v14, m[4], m[5])
        v3, v7, v11, v15 = _mix(v3, v7, v11, v15, m[6], m[7])
        v0, v5, v10, v15 = _mix(v0, v5, v10, v15, m[8], m[9])
        v1, v6, v11, v12 = _mix(v1, v6, v11, v12, m[10], m[11])
        v2, v7, v8, v13 = _mix(v2, v7, v8, v13, m[12], m[13])
        v3, v4, v9, v14 = _mix(v3, v4, v9, v14, m[14], m[15])
        low = (m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13])
        m = low + (m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8])
    first = (v0 ^ v8, v1 ^ v9, v2 ^ v10, v3 ^ v11)
    return first + (v4 ^ v12, v5 ^ v13, v6 ^ v14, v7 ^ v15)


@triton.jit
def _words(tile, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Split uint32[N, 16] into 16 words of N lanes."""
    e, o = tile.reshape(N, 8, 2).split()
    ee, eo = e.reshape(N, 4, 2).split()
    oe, oo = o.reshape(N, 4, 2).split()
    eee, eeo = ee.reshape(N, 2, 2).split()
    eoe, eoo = eo.reshape(N, 2, 2).split()
    oee, oeo = oe.reshape(N, 2, 2).split()
    ooe, ooo = oo.reshape(N, 2, 2).split()
    w0, w8 = eee.split()
    w4, w12 = eeo.split()
    w2, w10 = eoe.split()
    w6, w14 = eoo.split()
    w1, w9 = oee.split()
    w5, w13 = oeo.split()
    w3, w11 = ooe.split()
    w7, w15 = ooo.split()
    return w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15


@triton.jit
def _begin(key_ptr, zero):
    """Give the value that a chunk or a parent begins with: the key, or the IV."""
    h = ()
    for i in tl.static_range(8):
        h = h + (zero + tl.load(key_ptr + i),)  # type: ignore[assignment]  # a tuple that grows
    return h


@triton.jit
def whole_chunks_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    segments_ptr,  # int64[messages, count_segments], addresses
    key_ptr,  # uint32[8]
    values_ptr,  # uint32[messages, chunks, 8]
    messages,
    count_segments,
    segment_chunks,
    chunks,  # of a message
    flags,  # of every compression
    LANES: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < messages * chunks
    chunk = lane % chunks
    segment = (lane // chunks).to(tl.int64) * count_segments + chunk // segment_chunks
    base = tl.load(segments_ptr + segment, mask=live, other=0)
    base += (chunk % segment_chunks).to(tl.int64) * 1024
    # the hint comes after the cast: a pointer made of a loaded integer has no known alignment
    word_ptr = tl.multiple_of(base[:, None].to(tl.pointer_type(tl.uint32)), [16, 16])
    counter = chunk.to(tl.uint32)
    zero = counter & 0
    h = _begin(key_ptr, zero)
    column = tl.arange(0, 16)[None, :]
    for block in range(16):
        m = _words(tl.load(word_ptr + block * 16 + column, mask=live[:, None], other=0), LANES)
        flag = flags + tl.where(block == 0, _START, 0) + tl.where(block == 15, _END, 0)
        flag += tl.where((block == 15) & (chunks == 1), _ROOT, 0)
        h = _compress(h, m, counter, zero + _BLOCK, zero + flag.to(tl.uint32))
    place = values_ptr + lane.to(tl.int64) * 8
    for i in tl.static_range(8):
        tl.store(place + i, h[i], mask=live)


@triton.jit
def chunks_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    segments_ptr,  # int64[messages, count_segments], addresses
    nbytes_ptr,  # int64[messages]
    key_ptr,  # uint32[8]
    values_ptr,  # uint32[messages, chunks, 8]
    messages,
    count_segments,
    segment_bytes,
    chunks,  # of the longest message
    blocks,  # of 64 bytes, in the longest chunk
    flags,  # of every compression
    LANES: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < messages * chunks
    message = (lane // chunks).to(tl.int64)
    chunk = lane % chunks
    nbytes = tl.load(nbytes_ptr + message, mask=live, other=0)
    # bytes from the start of the chunk; a message of none has one chunk of none
    left = nbytes - chunk.to(tl.int64) * 1024
    live = live & ((left > 0) | (chunk == 0))
    alone = nbytes <= 1024
    left = tl.minimum(left, 1024).to(tl.int32)
    counter = chunk.to(tl.uint32)
    zero = counter & 0
    h = _begin(key_ptr, zero)
    column = tl.arange(0, 16)[None, :]
    for block in range(blocks):
        rest = left - block * 64
        on = live & ((rest > 0) | (block == 0))
        at = chunk.to(tl.int64) * 1024 + block * 64
        segment = message * count_segments + at // segment_bytes
        base = tl.load(segments_ptr + segment, mask=on & (rest > 0), other=0) + at % segment_bytes
        word_ptr = base[:, None].to(tl.pointer_type(tl.uint32)) + column
        inside = on[:, None] & (column * 4 < rest[:, None])
        m = _words(tl.load(word_ptr, mask=inside, other=0), LANES)
        end = tl.where(rest <= 64, _END + tl.where(alone, _ROOT, 0), 0)
        flag = flags + tl.where(block == 0, _START, 0) + end
        length = tl.maximum(tl.minimum(rest, 64), 0).to(tl.uint32)
        n = _compress(h, m, counter, length, flag.to(tl.uint32))
        kept = ()
        for i in tl.static_range(8):
            kept = kept + (tl.where(on, n[i], h[i]),)  # type: ignore[assignment]  # it grows
        h = kept
    place = values_ptr + lane.to(tl.int64) * 8
    for i in tl.static_range(8):
        tl.store(place + i, h[i], mask=live)


@triton.jit
def fold_chunks_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    values_ptr,  # uint32[messages, chunks, 8], overwritten
    nbytes_ptr,  # int64[messages]
    key_ptr,  # uint32[8]
    out_ptr,  # uint32[messages, 8]
    chunks,  # of the longest message
    flags,  # of every compression
    LANES: tl.constexpr,
):
    message = tl.program_id(0).to(tl.int64)
    value_ptr = values_ptr + message * chunks * 8
    word = tl.arange(0, 8)
    n = tl.maximum((tl.load(nbytes_ptr + message) + 1023) // 1024, 1).to(tl.int32)
    while n > 1:  # a level of the tree, in place; a node without a partner moves up
        pairs = n // 2
        flag = flags + _PARENT + tl.where(n == 2, _ROOT, 0)
        for first in range(0, pairs, LANES):
            pair = first + tl.arange(0, LANES)
            live = pair < pairs
            pair_ptr = value_ptr + pair[:, None] * 16 + tl.arange(0, 16)[None, :]
            m = _words(tl.load(pair_ptr, mask=live[:, None], other=0), LANES)
            zero = (pair * 0).to(tl.uint32)
            h = _compress(_begin(key_ptr, zero), m, zero, zero + _BLOCK, zero + flag.to(tl.uint32))
            tl.debug_barrier()  # all of this strip is read; its values land before the next one's
            for i in tl.static_range(8):
                tl.store(value_ptr + pair * 8 + i, h[i], mask=live)
            tl.debug_barrier()
        if n % 2 == 1:
            tl.store(value_ptr + pairs * 8 + word, tl.load(value_ptr + (n - 1) * 8 + word))
            tl.debug_barrier()
        n = pairs + n % 2
    tl.store(out_ptr + message * 8 + word, tl.load(value_ptr + word))


@triton.jit
def key_chain_kernel(  # type: ignore[no-untyped-def]  # triton reads annotations as its own
    leaves_ptr,  # uint32[blocks, 8]
    chains_ptr,  # int64[chains, 2]: first block, count of blocks
    parents_ptr,  # uint32[chains, 8]
    root_ptr,  # uint32[8]
    keys_ptr,  # uint32[blocks, 8]
    chains,
    longest,
    flags,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < chains
    first = tl.load(chains_ptr + lane * 2, mask=live, other=0)
    count = tl.load(chains_ptr + lane * 2 + 1, mask=live, other=0)
    zero = (lane * 0).to(tl.uint32)
    root = _begin(root_ptr, zero)
    parent = ()
    leaf = ()
    for i in tl.static_range(8):
        word = tl.load(parents_ptr + lane * 8 + i, mask=live, other=0)
        parent = parent + (word,)  # type: ignore[assignment]  # it grows
        word = tl.load(leaves_ptr + first * 8 + i, mask=count > 0, other=0)
        leaf = leaf + (word,)  # type: ignore[assignment]  # it grows
    for step in range(longest):
        following = ()  # fetched while this block is hashed
        for i in tl.static_range(8):
            place = (first + step + 1) * 8 + i
            word = tl.load(leaves_ptr + place, mask=step + 1 < count, other=0)
            following = following + (word,)  # type: ignore[assignment]  # it grows
        flag = zero + (flags + _START + _END + _ROOT).to(tl.uint32)
        parent = _compress(root, parent + leaf, zero, zero + _BLOCK, flag)
        for i in tl.static_range(8):
            tl.store(keys_ptr + (first + step) * 8 + i, parent[i], mask=step < count)
        leaf = following


def hash_messages(
    segments: Int64s,
    segment_bytes: int,
    nbytes: Int64s,
    out: Any,
    device: str | Launcher,
    key: bytes | None = None,
) -> None:
    """Write the BLAKE3 of each of M messages to `out`, in the device's current stream.

    segments: int64[M, S], the addresses of a message's segments, each of `segment_bytes` but for
    the last one that it has bytes in. nbytes: int64[M], a multiple of 4 each; 0 is allowed. out:
    uint32[M, 8], device memory: 32 bytes each. key: 32 bytes for the keyed hash. Addresses are
    multiples of 4; `segment_bytes` is a multiple of 64 unless there is one segment. Raises
    ValueError for what does not fit that.
    """
    _expect_messages(segments, segment_bytes, nbytes)
    messages = len(nbytes)
    if not messages:
        return
    expect_memory("out", out, WORD, 8 * messages)
    on = launcher(device)
    words, flags = _key(on, key)
    longest = int(nbytes.max())
    chunks = max(1, -(-longest // CHUNK))
    assert chunks * messages < 1 << 31
    values = on.empty((messages, chunks, 8), np.uint32)
    sizes = on.table(nbytes)
    table = on.table(segments)
    grid = (triton.cdiv(messages * chunks, LANES),)
    if _whole(segments, segment_bytes, nbytes):
        whole = (messages, segments.shape[1], max(1, segment_bytes // CHUNK), chunks, flags)
        on.run(whole_chunks_kernel, grid, (table, words, values, *whole), {"LANES": LANES}, 1)
    else:
        blocks = max(1, -(-min(longest, CHUNK) // BLOCK))
        counts = (messages, segments.shape[1], segment_bytes, chunks, blocks, flags)
        arguments = (table, sizes, words, values, *counts)
        on.run(chunks_kernel, grid, arguments, {"LANES": LANES}, 1)
    last = (values, sizes, words, out, chunks, flags)
    on.run(fold_chunks_kernel, (messages,), last, {"LANES": FOLD_LANES})


def key_chain(
    leaves: Any,
    counts: Sequence[int],
    root: bytes,
    out: Any,
    device: str | Launcher,
    parents: Sequence[bytes] | None = None,
) -> None:
    """Write the keys of the blocks of several prompts to `out`, in the device's current stream.

    leaves, out: uint32[blocks, 8], device memory, prompt after prompt. counts: the blocks of each
    prompt. root: 32 bytes. parents: for each prompt the key before its first block; 32 zero bytes
    where there is none. A prompt's keys follow each other, so many prompts take the time of one.
    """
    table = np.zeros((len(counts), 2), np.int64)
    table[:, 1] = counts
    table[:, 0] = np.cumsum(table[:, 1]) - table[:, 1]
    before = [bytes(KEY_BYTES)] * len(counts) if parents is None else list(parents)
    if len(before) != len(counts) or any(len(each) != KEY_BYTES for each in before):
        raise ValueError(f"{len(before)} parents, expected {len(counts)} of {KEY_BYTES} bytes")
    if len(table) and int(table[:, 1].min()) < 0:
        raise ValueError(f"a prompt of {int(table[:, 1].min())} blocks")
    blocks = int(table[:, 1].sum())
    if not blocks:
        return
    expect_memory("leaves", leaves, WORD, 8 * blocks)
    expect_memory("out", out, WORD, 8 * blocks)
    on = launcher(device)
    words, flags = _key(on, root)
    first = on.table(np.frombuffer(b"".join(before), "<u4").reshape(-1, 8))
    on.run(
        key_chain_kernel,
        (triton.cdiv(len(table), LANES),),
        (leaves, on.table(table), first, words, out, len(table), int(table[:, 1].max()), flags),
        {"LANES": LANES},
        1,
    )


def block_keys(
    tokens: Any,
    block_tokens: int,
    counts: Sequence[int],
    root: bytes,
    out: Any,
    device: str | Launcher,
    parents: Sequence[bytes] | None = None,
) -> None:
    """Write the keys of blocks of tokens to `out`: those of `kvengine.keys.chain`.

    tokens: uint32 or int32, device memory, `block_tokens` for each block, prompt after prompt. The
    rest as for `key_chain`. Raises TypeError for tokens of another width.
    """
    name = str(tokens.dtype).rpartition(".")[2]
    if name not in ("uint32", "int32"):
        raise TypeError(f"tokens are {name}, expected uint32 or int32: 4 bytes each are hashed")
    if block_tokens < 1:
        raise ValueError(f"blocks of {block_tokens} tokens, expected at least 1")
    blocks = int(sum(counts))
    if not blocks:
        return
    expect_memory("tokens", tokens, WORD, blocks * block_tokens)
    on = launcher(device)
    nbytes = np.full(blocks, WORD * block_tokens, np.int64)
    addresses = tokens.data_ptr() + np.arange(blocks) * nbytes
    leaves = on.empty((blocks, 8), np.uint32)
    hash_messages(addresses[:, None], WORD * block_tokens, nbytes, leaves, on)
    key_chain(leaves, counts, root, out, on, parents)


def _key(on: Launcher, key: bytes | None) -> tuple[Any, int]:
    """Return the words that every chunk begins with, and the flags of every compression."""
    if key is None:
        return on.table(np.array(IV, np.uint32)), 0
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
    return on.table(np.frombuffer(key, "<u4")), KEYED


def _whole(segments: Int64s, segment_bytes: int, nbytes: Int64s) -> bool:
    """Tell whether all messages are the same whole chunks, at addresses that are read wide."""
    same = int(nbytes.min()) == int(nbytes.max()) > 0 and int(nbytes[0]) % CHUNK == 0
    return same and segment_bytes % CHUNK == 0 and not (segments % 16).any()


def _expect_messages(segments: Int64s, segment_bytes: int, nbytes: Int64s) -> None:
    expect("nbytes", nbytes, np.int64, (len(nbytes),))
    expect("segments", segments, np.int64, (len(nbytes), None))
    count = segments.shape[1]
    if segment_bytes < 1 or segment_bytes >= 1 << 31 or (count > 1 and segment_bytes % BLOCK):
        raise ValueError(
            f"{count} segments of {segment_bytes} bytes, expected less than 2 GiB and, where there "
            f"are several, a multiple of {BLOCK}"
        )
    if not len(nbytes):
        return
    low, high = int(nbytes.min()), int(nbytes.max())
    if low < 0 or high > count * segment_bytes or (nbytes % WORD).any():
        raise ValueError(
            f"messages of {low} to {high} bytes, expected multiples of {WORD} up to the "
            f"{count * segment_bytes} of their segments: pad them, and hash their length"
        )
    if (segments % WORD).any():
        raise ValueError(f"segments begin on multiples of {WORD} bytes")


_WORDS = {"key_ptr": "*u32", "values_ptr": "*u32"}
VARIANTS = (
    Variant(
        "blake3 whole chunks",
        whole_chunks_kernel,
        signature={
            "segments_ptr": "*i64",
            **_WORDS,
            **dict.fromkeys(("messages", "count_segments", "segment_chunks"), "i32"),
            **dict.fromkeys(("chunks", "flags"), "i32"),
        },
        constants={"LANES": LANES},
        aligned=("segments_ptr", *_WORDS),
        num_warps=1,
        store_bits=32,  # a lane has its value to itself
        registers_max=96,
    ),
    Variant(
        "blake3 chunks of any length",
        chunks_kernel,
        signature={
            "segments_ptr": "*i64",
            "nbytes_ptr": "*i64",
            **_WORDS,
            **dict.fromkeys(("messages", "count_segments", "segment_bytes"), "i32"),
            **dict.fromkeys(("chunks", "blocks", "flags"), "i32"),
        },
        constants={"LANES": LANES},
        aligned=("segments_ptr", "nbytes_ptr", *_WORDS),
        num_warps=1,
        load_bits=64,  # of the tables: words are read one by one, up to the message's end
        store_bits=32,
        registers_max=160,
    ),
    Variant(
        "blake3 fold",
        fold_chunks_kernel,
        signature={
            "values_ptr": "*u32",
            "nbytes_ptr": "*i64",
            "key_ptr": "*u32",
            "out_ptr": "*u32",
            "chunks": "i32",
            "flags": "i32",
        },
        constants={"LANES": FOLD_LANES},
        aligned=("values_ptr", "nbytes_ptr", "key_ptr", "out_ptr"),
        store_bits=32,
        registers_max=96,
    ),
    Variant(
        "key chain",
        key_chain_kernel,
        signature={
            "leaves_ptr": "*u32",
            "chains_ptr": "*i64",
            "parents_ptr": "*u32",
            "root_ptr": "*u32",
            "keys_ptr": "*u32",
            **dict.fromkeys(("chains", "longest", "flags"), "i32"),
        },
        constants={"LANES": LANES},
        aligned=("leaves_ptr", "chains_ptr", "parents_ptr", "root_ptr", "keys_ptr"),
        num_warps=1,
        load_bits=32,  # a lane walks along a chain of its own
        store_bits=32,
        registers_max=128,
    ),
)
