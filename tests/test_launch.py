"""kvengine.kernels.launch: kernels go to a device with torch or without it.

Run as a program it is the process without torch: kernels are compiled for the device that a driver
names, and launched through it; the driver is a fake one.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fake_driver import FakeDriver
from kvengine.kernels import launch
from kvengine.kernels.launch import Bare


def test_kernels_launch_without_torch(require: Callable[[str], ModuleType], tmp_path: Path) -> None:
    require("triton")
    environ = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env={**environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sm_80", "sm_90", "swap", "digest"]


def test_memory_is_given_back_in_order() -> None:
    driver = FakeDriver()
    bare = Bare(driver, stream=7)
    table = bare.table(np.arange(5, dtype=np.int64))
    assert (table.shape, table.dtype, table.nbytes) == ((5,), np.int64, 40)
    assert bare.read(table).tolist() == [0, 1, 2, 3, 4]
    assert driver.calls[-2:] == ["download", "synchronize"]
    address = table.data_ptr()
    del table
    assert driver.freed == [address] and not driver.lent
    driver.fails.append("allocate")
    with pytest.raises(RuntimeError, match="allocate: CUDA_ERROR_FAKE"):
        bare.empty((4,), np.uint8)


def test_arguments_have_types() -> None:
    bare = Bare(FakeDriver())
    assert launch.kind_of(bare.empty((1,), np.uint64)) == "*u64"
    assert [launch.kind_of(each) for each in (5, -(1 << 31), 1 << 31)] == ["i32", "i32", "i64"]
    for wrong in (True, 0.5, "x", None, bare.empty((1,), np.complex64)):
        with pytest.raises(TypeError, match="is no argument of a kernel"):
            launch.kind_of(wrong)


def test_memory_that_does_not_fit_is_named(require: Callable[[str], ModuleType]) -> None:
    torch = require("torch")
    ids = torch.zeros((4, 3), dtype=torch.int32)
    bare = Bare(FakeDriver())
    for good in (ids, ids.view(-1), ids[1:], bare.empty((9,), np.int32)):
        launch.expect_memory("ids", good, 4, 9)
    for wrong, shown in (
        (ids[:, :2], "torch.int32[4, 2], not contiguous"),
        (ids.T, "torch.int32[3, 4], not contiguous"),
        (ids[:2], "torch.int32[2, 3]"),
        (ids.long(), "torch.int64[4, 3]"),
        (bare.empty((8,), np.int32), "int32[8]"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"ids is {shown}: expected contiguous")):
            launch.expect_memory("ids", wrong, 4, 8 if "not" in shown else 9)


def test_a_launcher_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = Bare(FakeDriver())
    assert launch.launcher(bare) is bare
    for wrong in ("tpu", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"^device '{wrong}', expected"):
            launch.launcher(wrong)
    monkeypatch.setattr(launch, "_torch_has_gpus", lambda: False)
    monkeypatch.setattr(launch, "bare", lambda index: index)
    assert launch.launcher("cuda:2") == 2


def test_torch_launches_where_it_has_gpus(
    require: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = require("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = launch.launcher("cuda:1")
    assert isinstance(found, launch.Torch) and found.name == "cuda:1"
    entered, launched = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda name: contextlib.closing(Entered(name)))

    class Entered:
        def __init__(self, name: str) -> None:
            entered.append(name)

        def close(self) -> None:
            entered.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **named: launched.append((grid, given, named, list(entered)))

    found.run(Kernel(), (3, 2), (5,), {"TILE": 8}, 1)
    options = {"TILE": 8, "num_warps": 1, "enable_fp_fusion": False}
    assert launched == [((3, 2), (5,), options, ["cuda:1"])]
    assert entered == ["cuda:1", "left"]  # of the device that it was made for


def bare_process() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it fails
    from kvengine.kernels import device, swap_device, xxh3_device
    from test_copy import CASES, Setup

    setup = Setup(CASES[0])
    for capability in (80, 90):
        driver = FakeDriver(capability)
        bare = Bare(driver, stream=5)
        device.gather(setup.moves, *setup.everything, bare)
        device.gather(setup.moves, (1, 3), (0, 2), bare)
        ((image, name, shared_bytes),) = driver.images  # loaded once
        assert image[:4] == b"\x7fELF" and name == "copy_runs_kernel" and shared_bytes == 0
        one, two = driver.launches
        assert one[1:5] == ((4, 6, 1), 128, 0, 5) and two[1] == (2, 4, 1)
        kinds = [kind for kind, _ in one[5]]
        assert kinds == [ctypes.c_uint64] * 3 + [ctypes.c_int32] * 5 + [ctypes.c_uint64] * 2
        assert [value for _, value in two[5][3:]] == [1, 0, 4, 1, 1, 0, 0]
        assert not driver.lent  # the tables went with the launches
        print(f"sm_{capability}")
    ones = np.ones(3, np.int64) << 40
    swap_device.swap(ones, ones + 4096, ones * 0 + 4096, bare)
    assert driver.images[-1][1] == "swap_kernel" and driver.launches[-1][1] == (3, 1, 1)
    print("swap")
    digests = bare.empty(setup.digests.shape, np.uint64)
    xxh3_device.gather(setup.moves, *setup.everything, digests, bare)
    assert [name for _, name, _ in driver.images[-2:]] == ["copy_sums_kernel", "fold_kernel"]
    address, filled = driver.launches[-1][5][3], digests.data_ptr()
    assert address == (ctypes.c_uint64, filled)
    try:
        bare.run(device.copy_runs_kernel, (1,), (1, 2), {"GATHER": True})
    except ValueError as error:
        assert "got 2 arguments" in str(error)
    print("digest")


if __name__ == "__main__":
    bare_process()
