"""A CUDA driver that is none: device memory is the host's, launches are written down.

FakeDriver stands in for `kvengine.kernels.driver.Cuda`, FakeLibrary for libcuda beneath it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvengine.kernels.driver import IPC_BYTES, DriverError


class FakeDriver:
    """Keeps count of what is held, and refuses what `fails` names."""

    def __init__(self, capability: int = 90, fails: Sequence[str] = ()) -> None:
        self._capability = capability
        self.fails = list(fails)
        self.lent: dict[int, np.ndarray] = {}
        self.freed: list[int] = []
        self.pinned: dict[int, int] = {}
        self.opened: dict[int, bytes] = {}
        self.images: list[tuple[bytes, str, int]] = []
        self.launches: list[tuple] = []
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise DriverError(f"{name}: CUDA_ERROR_FAKE (999)")

    def capability(self) -> int:
        return self._capability

    def numa_node(self) -> int | None:
        return None

    def load(self, image: bytes, name: str, shared_bytes: int) -> int:
        self._called("load")
        self.images.append((image, name, shared_bytes))
        return len(self.images)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        self._called("launch")
        given = [(type(each), each.value) for each in arguments]
        self.launches.append((function, grid, threads, shared_bytes, stream, given))

    def allocate(self, nbytes: int) -> int:
        self._called("allocate")
        memory = np.full(nbytes, 0xA5, np.uint8)
        self.lent[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        self._called("free")
        del self.lent[address]
        self.freed.append(address)

    def lend(self, nbytes: int, stream: int) -> int:
        return self.allocate(nbytes)

    def give_back(self, address: int, stream: int) -> None:
        self.free(address)

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        self._called("upload")
        ctypes.memmove(address, source, nbytes)

    def download(self, address: int, source: int, nbytes: int, stream: int) -> None:
        self._called("download")
        ctypes.memmove(address, source, nbytes)

    def synchronize(self, stream: int) -> None:
        self._called("synchronize")

    def register(self, address: int, nbytes: int) -> None:
        self._called("register")
        assert address not in self.pinned
        self.pinned[address] = nbytes

    def unregister(self, address: int) -> None:
        self._called("unregister")
        del self.pinned[address]

    def export(self, address: int) -> bytes:
        self._called("export")
        assert address in self.lent
        return address.to_bytes(IPC_BYTES, "little")

    def open(self, handle: bytes) -> int:
        self._called("open")
        address = int.from_bytes(handle, "little")
        self.opened[address] = handle
        return address

    def close(self, address: int) -> None:
        self._called("close")
        del self.opened[address]


class FakeLibrary:
    """Functions of libcuda: each writes its call down, fills what it is to fill, and answers 0.

    fills: what a call puts where its first argument points to. fails: the code a call answers.
    """

    def __init__(
        self, fills: dict[str, int] | None = None, fails: dict[str, int] | None = None
    ) -> None:
        self.fills, self.fails = fills or {}, fails or {}
        self.calls: list[tuple] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            if name in self.fills:
                arguments[0]._obj.value = self.fills[name]
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_FAKE"
            return self.fails.get(name, 0)

        return call

    def named(self, name: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == name]
