"""kvengine.kernels.blake3_device: hashes of a device are those of the package, keys those of keys.

Run as a program it does the device's part.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np
from blake3 import blake3

import gpu
from kvengine import keys
from kvengine.kernels import digest

POISON = 0xA5
PARTS = "lengths trees scattered chains refused".split()
KEY = bytes(range(32))


def test_a_device_hashes_as_the_package_does(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    assert gpu.run(__file__).split() == PARTS


def test_the_host_does_the_same() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096, dtype=np.uint8)
    segments = data.ctypes.data + np.array([[8192, 0], [4096, 8192]], np.int64)
    found = digest.hash_messages(segments, 2048, np.array([4096, 2052]), KEY)
    for row, size, starts in zip(found, (4096, 2052), ((8192, 0), (4096, 8192)), strict=True):
        whole = b"".join(data[at : at + 2048].tobytes() for at in starts)
        assert row.tobytes() == blake3(whole[:size], key=KEY).digest()
    tokens = np.arange(40, dtype=np.uint32)
    found = digest.block_keys(tokens, 8, [5], KEY)
    messages = [tokens[at : at + 8].tobytes() for at in range(0, 40, 8)]
    assert found.tobytes() == keys.chain(KEY, messages)


def hashed(
    segments: np.ndarray, segment_bytes: int, nbytes: list[int], key: bytes | None = None
) -> np.ndarray:
    """Hash on the device, and compare with the package."""
    from kvengine.kernels import blake3_device, launch

    on = launch.launcher(gpu.device())
    sizes = np.array(nbytes, np.int64)
    out = on.table(np.full((len(nbytes), 8), POISON, np.uint32))
    blake3_device.hash_messages(segments, segment_bytes, sizes, out, on, key)
    found = on.read(out)
    wanted = digest.hash_messages(segments, segment_bytes, sizes, key)
    assert np.array_equal(found, wanted), (segment_bytes, nbytes, key)
    return found


def memory(nbytes: int) -> np.ndarray:
    """Random bytes that the device reaches, at an address that is a multiple of 16."""
    data = gpu.reachable(np.random.default_rng(1).integers(0, 256, nbytes + 16, dtype=np.uint8))
    return data[-data.ctypes.data % 16 :][:nbytes]


def lengths() -> None:
    """Every multiple of 4 up to a chunk, in one launch of many lanes."""
    from kvengine.kernels import blake3_device

    lanes, blake3_device.LANES = blake3_device.LANES, 64 if gpu.device() == "cuda" else 512
    data = memory(4096)
    sizes = list(range(0, 1025, 4))
    starts = data.ctypes.data + np.random.default_rng(2).integers(0, 700, len(sizes)) * 4
    found = hashed(starts[:, None], 1024, sizes)
    for start, size, row in zip(starts.tolist(), sizes, found, strict=True):
        at = start - data.ctypes.data
        assert row.tobytes() == blake3(data[at : at + size].tobytes()).digest()
    blake3_device.LANES = lanes


def trees() -> None:
    """Chunks that do not pair off, lengths that differ, and whole chunks, plain and keyed."""
    data = memory(8192)
    starts = data.ctypes.data + np.arange(0, 20, 4, np.int64)
    hashed(starts[:, None], 8192, [1028, 0, 3004, 1024, 5120], KEY)
    aligned = data.ctypes.data + np.array([[0], [1024]], np.int64)
    hashed(aligned, 8192, [1024] * 2)
    hashed(aligned, 8192, [7168] * 2, KEY)
    hashed(np.zeros((0, 1), np.int64), 64, [])


def scattered() -> None:
    """Segments anywhere, also the same one twice, and ones that a message does not reach."""
    data = memory(8192)
    rng = np.random.default_rng(3)
    whole = data.ctypes.data + rng.integers(0, 384, (2, 3)) * 16
    whole[1] = whole[0, 0]
    hashed(whole, 1024, [3072] * 2)
    small = data.ctypes.data + rng.integers(0, 1900, (2, 7)) * 4
    hashed(small, 192, [1344, 1028], KEY)


def chains() -> None:
    """Keys of several prompts are those of keys.chain, also in the middle of a prompt."""
    from kvengine.kernels import blake3_device, launch

    on = launch.launcher(gpu.device())
    rng = np.random.default_rng(4)
    for block_tokens, counts in ((16, [3, 0, 1]), (300, [1, 1]), (5, [0])):
        blocks = sum(counts)
        tokens = rng.integers(0, 1 << 32, blocks * block_tokens, dtype=np.uint32)
        parents = [bytes(32)] + [rng.bytes(32) for _ in counts[1:]]
        given = on.table(tokens if block_tokens == 16 else tokens.view(np.int32))
        out = on.table(np.full((max(1, blocks), 8), POISON, np.uint32))
        blake3_device.block_keys(given, block_tokens, counts, KEY, out, on, parents)
        found = on.read(out)[:blocks]
        wanted = digest.block_keys(tokens, block_tokens, counts, KEY, parents)
        assert np.array_equal(found, wanted)
        at = 0
        for count, parent in zip(counts, parents, strict=True):
            step = block_tokens
            own = tokens[at * step : (at + count) * step]
            messages = [own[i * step : (i + 1) * step].tobytes() for i in range(count)]
            assert found[at : at + count].tobytes() == keys.chain(KEY, messages, parent)
            at += count


def refused() -> None:
    """What does not fit is named, before anything is launched."""
    from kvengine.kernels import blake3_device, launch

    on = launch.launcher(gpu.device())
    one, two = np.zeros((1, 1), np.int64), np.zeros((1, 2), np.int64)
    size = np.array([64], np.int64)
    tokens = on.table(np.zeros(16, np.int64))
    out = on.table(np.zeros((1, 8), np.uint32))

    def hash(*arguments: object, **named: object) -> None:
        blake3_device.hash_messages(*arguments, out, on, **named)

    for error, said, call in (
        (ValueError, "multiples of 4 up to the 64", lambda: hash(one, 64, size - 1)),
        (ValueError, "messages of 68 to 68", lambda: hash(one, 64, size + 4)),
        (ValueError, "messages of -4 to -4", lambda: hash(one, 64, size - 68)),
        (ValueError, "2 segments of 100 bytes", lambda: hash(two, 100, size)),
        (ValueError, "1 segments of 0 bytes", lambda: hash(one, 0, size)),
        (ValueError, "begin on multiples of 4", lambda: hash(one + 2, 64, size)),
        (ValueError, "segments is int64[1, 2], expected", lambda: hash(two, 64, np.tile(size, 2))),
        (ValueError, "a key has 32 bytes, got 3", lambda: hash(one, 64, size, key=b"abc")),
        (TypeError, "tokens are int64", lambda: keys_of(tokens, 16, [1])),
        (
            ValueError,
            "blocks of 0 tokens",
            lambda: keys_of(on.table(np.zeros(1, np.int32)), 0, [1]),
        ),
        (
            ValueError,
            "tokens is torch.int32[31]" if isinstance(on, launch.Torch) else "tokens is int32[31]",
            lambda: keys_of(on.table(np.zeros(31, np.int32)), 16, [2]),
        ),
        (ValueError, "2 parents, expected 1", lambda: chain_of([1], [KEY, KEY])),
        (ValueError, "of 32 bytes", lambda: chain_of([1], [KEY[1:]])),
        (ValueError, "a prompt of -1 blocks", lambda: chain_of([2, -1], None)),
    ):
        try:
            call()
        except error as found:
            assert said in str(found), (said, found)
        else:
            raise AssertionError(said)


def keys_of(tokens: object, block_tokens: int, counts: list[int]) -> None:
    from kvengine.kernels import blake3_device

    blake3_device.block_keys(tokens, block_tokens, counts, KEY, None, gpu.device())


def chain_of(counts: list[int], parents: list[bytes] | None) -> None:
    from kvengine.kernels import blake3_device

    blake3_device.key_chain(None, counts, KEY, None, gpu.device(), parents)


if __name__ == "__main__":
    for name in PARTS:
        globals()[name]()
        print(name, flush=True)
