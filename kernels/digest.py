"""xxh3-128 of spans of memory, the digest that a frame keeps for each segment, and BLAKE3.

A digest is two 64-bit words, (low, high) of the 128-bit value: seed 0 and the default secret, equal
to `xxhash.xxh3_128` for every length. Called where bytes are verified without being moved;
`kvengine.kernels.copy` digests what it moves. Source: the xxHash specification
(doc/xxhash_spec.md, Cyan4973/xxHash). BLAKE3 is the `blake3` package's, whose own vector code is
the fast path of a host; `blake3_device.py` does the same on a device.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from kvengine.kernels.launch import choose

WORD = (1 << 64) - 1
KEY_BYTES = 32


def digest(address: int, nbytes: int) -> tuple[int, int]:
    """Return the digest (low, high) of `nbytes` bytes at `address`."""
    value = xxhash.xxh3_128_intdigest(_bytes_at(address, nbytes))
    return value & WORD, value >> 64


def digest_spans(
    addresses: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.int64],
    out: npt.NDArray[np.uint64],
    *,
    native: bool | None = None,
) -> None:
    """Write the digest of each span of memory to `out`.

    addresses, nbytes: int64[n]; out: uint64[n, 2], (low, high); all C-contiguous. The caller keeps
    the memory alive. With numba the interpreter's lock is released for the whole call;
    `native=False` is the plain path, with the same result. Raises ValueError for tables that do
    not fit each other.
    """
    count = len(addresses)
    _expect("addresses", addresses, np.int64, (count,))
    _expect("nbytes", nbytes, np.int64, (count,))
    _expect("out", out, np.uint64, (count, 2))
    compiled = choose(native)
    short = np.arange(count)
    if compiled is not None:
        compiled.digest(addresses, nbytes, out)
        short = np.flatnonzero(nbytes <= compiled.SHORT_NBYTES)
    for i in short.tolist():
        out[i] = digest(int(addresses[i]), int(nbytes[i]))


def hash_messages(
    segments: npt.NDArray[np.int64],
    segment_bytes: int,
    nbytes: npt.NDArray[np.int64],
    key: bytes | None = None,
) -> npt.NDArray[np.uint32]:
    """Return the BLAKE3 of each of M messages, uint32[M, 8]: 32 bytes each.

    segments: int64[M, S], the addresses of a message's segments, each of `segment_bytes` but for
    the last one that it has bytes in. nbytes: int64[M]. key: 32 bytes for the keyed hash.
    """
    found = []
    for row, size in zip(segments.tolist(), nbytes.tolist(), strict=True):
        hasher = blake3(key=key) if key is not None else blake3()
        for s, address in enumerate(row):
            count = min(segment_bytes, size - s * segment_bytes)
            if count > 0:
                hasher.update(memoryview(_bytes_at(address, count)).cast("B"))
        found.append(hasher.digest())
    return np.frombuffer(b"".join(found), "<u4").reshape(-1, 8)


def block_keys(
    tokens: npt.NDArray[np.uint32],
    block_tokens: int,
    counts: Sequence[int],
    root: bytes,
    parents: Sequence[bytes] | None = None,
) -> npt.NDArray[np.uint32]:
    """Return the keys of the blocks of several prompts, uint32[blocks, 8].

    tokens: `block_tokens` for each block, prompt after prompt, `counts` blocks each. A key is the
    keyed BLAKE3 of the key before it and the BLAKE3 of the block's tokens. root: 32 bytes. parents:
    for each prompt the key before its first block; 32 zero bytes where there is none.
    """
    blocks = tokens.reshape(-1, block_tokens)
    keys, at = [], 0
    for number, count in enumerate(counts):
        parent = bytes(KEY_BYTES) if parents is None else parents[number]
        for block in blocks[at : at + count]:
            parent = blake3(parent + blake3(block.tobytes()).digest(), key=root).digest()
            keys.append(parent)
        at += count
    return np.frombuffer(b"".join(keys), "<u4").reshape(-1, 8)


def _bytes_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * nbytes).from_address(address)


def _expect(name: str, table: npt.NDArray[np.generic], dtype: type, shape: tuple[int, ...]) -> None:
    if table.dtype != dtype or table.shape != shape or not table.flags.c_contiguous:
        raise ValueError(
            f"{name} is {table.dtype}{list(table.shape)}, expected C-contiguous "
            f"{np.dtype(dtype)}{list(shape)}"
        )
