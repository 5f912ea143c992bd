"""kvengine.kernels.digest: equal to the xxhash package, for every length and both paths."""

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import xxhash

from kvengine.kernels import digest

BIG = [4095, 4096, 65_536, 65_537, 1 << 20, (1 << 20) + 63, 5_000_011]


def expected(data: np.ndarray) -> tuple[int, int]:
    value = xxhash.xxh3_128_intdigest(data.tobytes())
    return value & (1 << 64) - 1, value >> 64


@pytest.fixture(params=["native", "plain"])
def native(request: pytest.FixtureRequest, require: Callable[[str], ModuleType]) -> bool:
    if request.param == "native":
        require("numba")
    return request.param == "native"


@pytest.mark.parametrize("lead", [0, 1, 8], ids="lead{}".format)
def test_digests_equal_xxhash(native: bool, lead: int) -> None:
    data = np.random.default_rng(3).integers(0, 256, max(BIG) + lead, dtype=np.uint8)
    nbytes = np.array([*range(2101), *BIG], np.int64)
    addresses = np.full(len(nbytes), data.ctypes.data + lead, np.int64)
    out = np.full((len(nbytes), 2), 0xA5, np.uint64)
    digest.digest_spans(addresses, nbytes, out, native=native)
    for size, found in zip(nbytes.tolist(), out.tolist(), strict=True):
        assert tuple(found) == expected(data[lead : lead + size]), size


def test_one_span_and_no_span(native: bool) -> None:
    data = np.arange(256, dtype=np.uint8)
    assert digest.digest(data.ctypes.data, 256) == expected(data)
    none = np.zeros(0, np.int64)
    digest.digest_spans(none, none, np.zeros((0, 2), np.uint64), native=native)


@pytest.mark.parametrize(
    ("nbytes", "out", "named"),
    [
        (np.zeros(3, np.int64), np.zeros((2, 2), np.uint64), "nbytes"),
        (np.zeros(2, np.int32), np.zeros((2, 2), np.uint64), "nbytes"),
        (np.zeros(2, np.int64), np.zeros((2, 2), np.int64), "out"),
        (np.zeros(2, np.int64), np.zeros((2, 2), np.uint64).T, "out"),
    ],
)
def test_tables_that_do_not_fit_are_named(nbytes: np.ndarray, out: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is .*, expected"):
        digest.digest_spans(np.zeros(2, np.int64), nbytes, out, native=False)


def test_importing_the_launchers_loads_nothing_optional() -> None:
    code = (
        "import sys, kvengine.kernels.copy, kvengine.kernels.digest\n"
        "print([m for m in ('numba', 'triton', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
