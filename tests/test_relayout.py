"""kvengine.kernels.relayout: frames split, merged and turned, by every way that moves bytes.

Run as a program it does the device's part.
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

import gpu
from kvengine.kernels import copy
from kvengine.kernels.relayout import Form, relayout, relayout_reference

POISON = 0xA5
CASES = [  # order and heads of the wide frames, and of the narrow ones; rows; tokens
    ("NHD", 4, "HND", 4, (160, 160), 6),
    ("HND", 4, "NHD", 4, (160, 160), 6),
    ("NHD", 4, "NHD", 4, (160, 96), 6),
    ("NHD", 8, "NHD", 2, (64, 64), 16),
    ("HND", 8, "HND", 4, (64, 64), 16),
    ("NHD", 6, "HND", 2, (81, 33), 5),
    ("HND", 6, "NHD", 3, (81, 33), 5),
    ("NHD", 8, "NHD", 1, (256, 128), 16),
    ("HND", 3, "NHD", 1, (241,), 1),
    ("NHD", 1, "HND", 1, (1152,), 7),
]


class Setup:
    def __init__(
        self, case: tuple, place: Callable[[np.ndarray], np.ndarray] = np.asarray, count: int = 3
    ) -> None:
        wide_order, wide_heads, narrow_order, heads, rows, tokens = case
        self.wide = Form(wide_order, 2, tokens, wide_heads, rows)
        self.narrow = Form(narrow_order, 2, tokens, heads, rows)
        rng = np.random.default_rng(1)
        parts = wide_heads // heads
        blocks = rng.integers(0, 256, (count, self.wide.nbytes), dtype=np.uint8)
        self.blocks = place(blocks)
        self.wanted = relayout_reference(self.wide, self.narrow, blocks)
        self.parts = place(np.full((count, parts, self.narrow.nbytes), POISON, np.uint8))
        self.moves = relayout(
            self.wide,
            self.narrow,
            self.blocks.ctypes.data + np.arange(count) * self.wide.nbytes,
            self.parts.ctypes.data
            + np.arange(count * parts).reshape(count, parts) * self.narrow.nbytes,
        )
        self.everything = (0, count * parts), (0, 2)
        self.digests = np.zeros((count * parts, 2, 2), np.uint64)

    def check(self, gather: Callable, scatter: Callable) -> None:
        """Split, then merge what was split into frames that were poisoned."""
        self.moves.check()
        gather(self.moves, *self.everything)
        assert np.array_equal(self.parts, self.wanted)
        before = self.blocks.copy()
        self.blocks[...] = POISON
        scatter(self.moves, *self.everything)
        assert np.array_equal(self.blocks, before)
        assert np.array_equal(self.parts, self.wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1]}-{case[2]}{case[3]}")
@pytest.mark.parametrize("way", ["native", "plain", "reference"])
def test_parts_are_split_and_merged(
    case: tuple, way: str, require: Callable[[str], ModuleType]
) -> None:
    if way == "native":
        require("numba")
    setup = Setup(case)
    verdicts = np.zeros(setup.digests.shape[:2], np.uint8)
    native = {"native": way == "native"} if way != "reference" else {}
    gather = copy.gather_reference if way == "reference" else copy.gather
    scatter = copy.scatter_reference if way == "reference" else copy.scatter
    setup.check(
        lambda *ranges: gather(*ranges, setup.digests, **native),
        lambda *ranges: scatter(*ranges, setup.digests, verdicts, **native),
    )
    assert (verdicts == copy.GOOD).all()
    setup.parts[2, 0, 5] ^= 1
    scatter(setup.moves, *setup.everything, setup.digests, verdicts, **native)
    assert (verdicts == copy.BAD).sum() == 1


def test_there_and_back_is_the_same() -> None:
    there = Setup(CASES[0])
    copy.gather(there.moves, *there.everything, there.digests)
    back = relayout_reference(there.narrow, there.wide, there.parts[:, 0])
    assert np.array_equal(back[:, 0], there.blocks)


def test_no_blocks() -> None:
    setup = Setup(CASES[3], count=0)
    copy.gather(setup.moves, *setup.everything, setup.digests)


def test_forms_that_do_not_fit_are_named() -> None:
    form = Form("NHD", 2, 4, 6, (32, 32))
    one, two = np.zeros(1, np.int64), np.zeros((1, 2), np.int64)
    for other in (
        Form("NHD", 2, 4, 4, (32, 32)),
        Form("NHD", 2, 5, 3, (32, 32)),
        Form("HND", 3, 4, 3, (32, 32)),
        Form("HND", 2, 4, 3, (32,)),
    ):
        with pytest.raises(ValueError, match="are no parts of"):
            relayout(form, other, one, two)
    with pytest.raises(ValueError, match="^narrow_frames is"):
        relayout(form, Form("HND", 2, 4, 2, (32, 32)), one, two)
    with pytest.raises(ValueError, match="order 'NDH', expected one of NHD, HND"):
        Form("NDH", 2, 4, 6, (32, 32))
    with pytest.raises(ValueError, match="at least 1"):
        Form("NHD", 2, 4, 6, (32, 0))


def test_the_device_does_the_same(require: Callable[[str], ModuleType]) -> None:
    require("torch")
    require("triton")
    assert gpu.run(__file__).split() == [str(number) for number in range(len(CASES))]


def on_device() -> None:
    from kvengine.kernels import device

    def settled(verb: Callable) -> Callable:
        def call(*arguments: object) -> None:
            verb(*arguments, gpu.device())
            gpu.settle()

        return call

    for number, case in enumerate(CASES):
        Setup(case, place=gpu.reachable).check(settled(device.gather), settled(device.scatter))
        print(number)


if __name__ == "__main__":
    on_device()
