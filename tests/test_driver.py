"""kvengine.kernels.driver: what reaches libcuda, against a library that is none."""

import ctypes
from pathlib import Path

import pytest

from fake_driver import FakeLibrary
from kvengine.kernels import driver
from kvengine.kernels.driver import Cuda, DriverError

FILLS = {
    "cuDevicePrimaryCtxRetain": 70,
    "cuModuleLoadData": 71,
    "cuModuleGetFunction": 72,
    "cuMemAlloc_v2": 1 << 40,
    "cuMemAllocAsync": 1 << 41,
    "cuIpcOpenMemHandle_v2": 1 << 42,
    "cuDeviceGetAttribute": 9,
}


def value(argument: object) -> object:
    return getattr(argument, "value", argument)


def test_a_launch_passes_the_addresses_of_its_arguments() -> None:
    library = FakeLibrary(FILLS)
    found = Cuda(library=library)
    function = found.load(b"\x7fELF\0\0", "kernel", 100 << 10)
    assert function == 72
    assert [value(each) for each in library.named("cuFuncSetAttribute")[0]] == [72, 8, 100 << 10]
    given = [ctypes.c_uint64(1 << 40), ctypes.c_int32(-3), ctypes.c_float(0.5)]
    found.launch(function, (5, 2, 1), 128, 64, 9, given)
    ((handle, *sizes, stream, table, extra),) = library.named("cuLaunchKernel")
    assert (value(handle), [value(each) for each in sizes]) == (72, [5, 2, 1, 128, 1, 1, 64])
    assert (value(stream), value(extra)) == (9, None)
    kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float)
    assert [
        ctypes.cast(place, ctypes.POINTER(kind)).contents.value
        for place, kind in zip(table, kinds, strict=True)
    ] == [1 << 40, -3, 0.5]
    assert len(library.named("cuCtxSetCurrent")) == 4  # load: two calls and the attribute


def test_memory_streams_and_sharing_reach_the_library() -> None:
    library = FakeLibrary(FILLS)
    found = Cuda(library=library)
    assert found.capability() == 99
    assert (found.allocate(64), found.lend(64, 3)) == (1 << 40, 1 << 41)
    found.free(1 << 40)
    found.give_back(1 << 41, 3)
    found.upload(1 << 40, 4096, 16, 3)
    found.download(4096, 1 << 40, 16, 3)
    found.synchronize(3)
    found.register(8192, 4096)
    found.unregister(8192)
    assert found.export(1 << 40) == bytes(64)
    assert found.open(bytes(64)) == 1 << 42
    found.close(1 << 42)
    assert found.load(b"", "small", 1024) == 72 and not library.named("cuFuncSetAttribute")
    plain = [[value(each) for each in call] for call in library.named("cuMemHostRegister_v2")]
    assert plain == [[8192, 4096, 3]]
    for name, expected in (
        ("cuMemcpyHtoDAsync_v2", [1 << 40, 4096, 16, 3]),
        ("cuMemcpyDtoHAsync_v2", [4096, 1 << 40, 16, 3]),
        ("cuMemFreeAsync", [1 << 41, 3]),
    ):
        assert [value(each) for each in library.named(name)[0]] == expected
    with pytest.raises(ValueError, match="64 bytes, got 3"):
        found.open(b"abc")


def test_the_node_of_a_device_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeLibrary(FILLS)
    library.__dict__["cuDeviceGetPCIBusId"] = lambda name, *rest: (
        setattr(name, "value", b"0000:0A:00.0") or 0
    )
    found = Cuda(library=library)
    monkeypatch.setattr(driver, "Path", lambda _: tmp_path)
    place = tmp_path / "0000:0a:00.0"
    place.mkdir()
    assert found.numa_node() is None
    for text, node in (("1\n", 1), ("-1\n", None), ("?", None)):
        (place / "numa_node").write_text(text)
        assert found.numa_node() == node


def test_a_refusal_is_named() -> None:
    library = FakeLibrary(FILLS, {"cuMemHostRegister_v2": 2})
    with pytest.raises(DriverError, match=r"^cuMemHostRegister_v2: CUDA_ERROR_FAKE \(2\)$"):
        Cuda(library=library).register(8192, 4096)
    with pytest.raises(DriverError, match="cuDeviceGet"):
        Cuda(3, FakeLibrary(FILLS, {"cuDeviceGet": 101}))


def test_no_driver_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda_of_no_machine.so.1")
    with pytest.raises(ImportError, match="no CUDA driver on this machine .* device='cpu'"):
        Cuda()
