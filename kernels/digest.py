"""xxh3-128 of spans of memory: the digest that a frame keeps for each segment.

A digest is two 64-bit words, (low, high) of the 128-bit value: seed 0 and the default secret, equal
to `xxhash.xxh3_128` for every length. Called where bytes are verified without being moved;
`kvengine.kernels.copy` digests what it moves. Source: the xxHash specification
(doc/xxhash_spec.md, Cyan4973/xxHash).
"""

import ctypes

import numpy as np
import numpy.typing as npt
import xxhash

from kvengine.kernels.launch import choose

WORD = (1 << 64) - 1


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


def _bytes_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * nbytes).from_address(address)


def _expect(name: str, table: npt.NDArray[np.generic], dtype: type, shape: tuple[int, ...]) -> None:
    if table.dtype != dtype or table.shape != shape or not table.flags.c_contiguous:
        raise ValueError(
            f"{name} is {table.dtype}{list(table.shape)}, expected C-contiguous "
            f"{np.dtype(dtype)}{list(shape)}"
        )
