"""kvengine.kernels.swap_device: lists of spans, of any size and alignment, by few programs.

Run as a program it does the device's part.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

import gpu
from kvengine.kernels import copy

POISON = 0xA5
CASES = {  # nbytes of the spans; bytes by which they miss an alignment of 64
    "pages": ([4096] * 9, 0),
    "sizes": ([0, 16, 4096, 16_384, 16_400, 40_000, 0, 64], 0),
    "eights": ([8, 24, 4104, 20_000], 8),
    "fours": ([4, 12, 8196, 20_004], 4),
    "twos": ([2, 6, 4098], 2),
    "bytes": ([1, 2, 2047, 2048, 2049, 5001], 1),
    "one": ([4096], 0),
    "none": ([], 0),
    "empty": ([0, 0], 0),
}


def test_spans_are_copied_on_the_host(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    swap = require("kvengine.kernels.swap_device")
    plain = functools.partial(copy.copy_spans, native=False)
    for sizes, lead in CASES.values():
        for verb in (copy.copy_spans, plain, swap.swap_reference):
            check(verb, sizes, lead)


def test_tables_that_do_not_fit_are_named(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    swap = require("kvengine.kernels.swap_device")
    two, three = np.zeros(2, np.int64), np.zeros(3, np.int64)
    for verb in (copy.copy_spans, lambda *tables: swap.swap(*tables, "cpu")):
        with pytest.raises(ValueError, match="^sources is int64"):
            verb(two, three, three)
        with pytest.raises(ValueError, match="^targets is int32"):
            verb(two, two.astype(np.int32), two)
        with pytest.raises(ValueError, match="a span of -4 bytes"):
            verb(two, two, two - 4)
    with pytest.raises(ValueError, match="0 programs"):
        swap.swap(two, two, two + 1, "cpu", programs=0)


def test_a_device_swaps_them(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    assert gpu.run(__file__).split() == list(CASES)


def check(verb: Callable, sizes: list[int], lead: int) -> None:
    """Every byte of a span is copied, every other one is left alone; sources may repeat."""
    rng = np.random.default_rng(2)
    nbytes = np.array(sizes, np.int64)
    stride = -(-int(nbytes.max(initial=1)) // 64) * 64 + 64
    source = gpu.reachable(rng.integers(0, 256, stride * 3 + 128, dtype=np.uint8))
    target = gpu.reachable(np.full(stride * max(1, len(sizes)) + 128, POISON, np.uint8))
    begins = -source.ctypes.data % 64 + lead + rng.integers(0, 3, len(sizes)) * stride
    ends = -target.ctypes.data % 64 + lead + rng.permutation(len(sizes)) * stride
    wanted = target.copy()
    for begin, end, size in zip(begins.tolist(), ends.tolist(), sizes, strict=True):
        wanted[end : end + size] = source[begin : begin + size]
    verb(source.ctypes.data + begins, target.ctypes.data + ends, nbytes)
    gpu.settle()
    assert np.array_equal(target, wanted), sizes


def on_device() -> None:
    from kvengine.kernels import swap_device as swap

    for name, (sizes, lead) in CASES.items():
        for programs in (1, swap.PROGRAMS):
            check(
                lambda *tables, count=programs: swap.swap(*tables, gpu.device(), count),
                sizes,
                lead,
            )
        print(name)


if __name__ == "__main__":
    on_device()
