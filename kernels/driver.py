"""The CUDA driver, by ctypes: what launching, pinning and sharing need where torch is not there.

`Driver` is what the others are given; `Cuda` is the real one, over libcuda. Tests give another
library, or another Driver. A call that the driver refuses raises DriverError with the driver's own
name of the fault. Nothing is loaded before `Cuda` is made.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

LIBRARY = "libcuda.so.1"
IPC_BYTES = 64  # of a handle

SUCCESS = 0
HOST_REGISTER_PORTABLE, HOST_REGISTER_MAPPED = 1, 2
IPC_LAZY_PEER_ACCESS = 1
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
FUNCTION_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_BYTES = 48 << 10  # of a program, without asking for more
PCI_NAME_BYTES = 32


class DriverError(RuntimeError):
    """The driver refused a call; the message names the call and its reason."""


class Driver(Protocol):
    """One device and its primary context. Addresses are integers; streams are handles, 0 the
    default one. Every method may be called from any thread."""

    def capability(self) -> int:
        """Return the compute capability: 90 for 9.0."""
        ...

    def numa_node(self) -> int | None:
        """Return the node of the host's memory that is nearest, None where nobody says."""
        ...

    def load(self, image: bytes, name: str, shared_bytes: int) -> int:
        """Load a cubin and return its function `name`, which may use so much shared memory."""
        ...

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],  # simple ctypes values
    ) -> None:
        """Enqueue one launch."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Return the address of so many bytes of device memory."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` gave, once all that was enqueued before is over."""
        ...

    def lend(self, nbytes: int, stream: int) -> int:
        """Allocate in the order of a stream."""
        ...

    def give_back(self, address: int, stream: int) -> None:
        """Free what `lend` gave, after all that the stream was given before."""
        ...

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from host to device; pageable memory may be reused on return."""
        ...

    def download(self, address: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from device to host, in the order of the stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait for all that the stream was given."""
        ...

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, so that the device reads and writes it at its own address."""
        ...

    def unregister(self, address: int) -> None:
        """Unpin what `register` pinned."""
        ...

    def export(self, address: int) -> bytes:
        """Return the handle by which another process opens what `allocate` gave."""
        ...

    def open(self, handle: bytes) -> int:
        """Map device memory of another process; return its address here."""
        ...

    def close(self, address: int) -> None:
        """Unmap what `open` gave."""
        ...


class Cuda:
    """The driver of the `index`-th CUDA device.

    library: what `ctypes.CDLL` gives; libcuda of this system where left out. Raises ImportError
    where there is none, DriverError where there is no such device.
    """

    def __init__(self, index: int = 0, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise ImportError(
                    f"no CUDA driver on this machine ({error}): give device='cpu'"
                ) from error
        self._library = library
        self._call("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._device = device
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context

    def capability(self) -> int:
        return 10 * self._attribute(CAPABILITY_MAJOR) + self._attribute(CAPABILITY_MINOR)

    def numa_node(self) -> int | None:
        name = ctypes.create_string_buffer(PCI_NAME_BYTES)
        self._call("cuDeviceGetPCIBusId", name, ctypes.c_int(PCI_NAME_BYTES), self._device)
        path = Path("/sys/bus/pci/devices") / name.value.decode().lower() / "numa_node"
        try:
            node = int(path.read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None

    def load(self, image: bytes, name: str, shared_bytes: int) -> int:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._here("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        self._here("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        if shared_bytes > SHARED_BYTES:
            kind, size = ctypes.c_int(FUNCTION_SHARED_BYTES), ctypes.c_int(shared_bytes)
            self._here("cuFuncSetAttribute", function, kind, size)
        return _value(function)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        places = [ctypes.cast(ctypes.pointer(each), ctypes.c_void_p) for each in arguments]
        table = (ctypes.c_void_p * len(places))(*places)
        sizes = (*grid, threads, 1, 1, shared_bytes)
        self._here(
            "cuLaunchKernel",
            ctypes.c_void_p(function),
            *(ctypes.c_uint(size) for size in sizes),
            ctypes.c_void_p(stream),
            table,
            ctypes.c_void_p(0),
        )

    def allocate(self, nbytes: int) -> int:
        found = ctypes.c_uint64()
        self._here("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(nbytes))
        return found.value

    def free(self, address: int) -> None:
        self._here("cuMemFree_v2", ctypes.c_uint64(address))

    def lend(self, nbytes: int, stream: int) -> int:
        found = ctypes.c_uint64()
        size = ctypes.c_size_t(nbytes)
        self._here("cuMemAllocAsync", ctypes.byref(found), size, ctypes.c_void_p(stream))
        return found.value

    def give_back(self, address: int, stream: int) -> None:
        self._here("cuMemFreeAsync", ctypes.c_uint64(address), ctypes.c_void_p(stream))

    def upload(self, address: int, source: int, nbytes: int, stream: int) -> None:
        places = (ctypes.c_uint64(address), ctypes.c_void_p(source))
        self._copy("cuMemcpyHtoDAsync_v2", places, nbytes, stream)

    def download(self, address: int, source: int, nbytes: int, stream: int) -> None:
        places = (ctypes.c_void_p(address), ctypes.c_uint64(source))
        self._copy("cuMemcpyDtoHAsync_v2", places, nbytes, stream)

    def synchronize(self, stream: int) -> None:
        self._here("cuStreamSynchronize", ctypes.c_void_p(stream))

    def register(self, address: int, nbytes: int) -> None:
        flags = ctypes.c_uint(HOST_REGISTER_PORTABLE | HOST_REGISTER_MAPPED)
        size = ctypes.c_size_t(nbytes)
        self._here("cuMemHostRegister_v2", ctypes.c_void_p(address), size, flags)

    def unregister(self, address: int) -> None:
        self._here("cuMemHostUnregister", ctypes.c_void_p(address))

    def export(self, address: int) -> bytes:
        handle = Handle()
        self._here("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        if len(handle) != IPC_BYTES:
            raise ValueError(f"an IPC handle has {IPC_BYTES} bytes, got {len(handle)}")
        found, given = ctypes.c_uint64(), Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(IPC_LAZY_PEER_ACCESS)
        self._here("cuIpcOpenMemHandle_v2", ctypes.byref(found), given, flags)
        return found.value

    def close(self, address: int) -> None:
        self._here("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _attribute(self, kind: int) -> int:
        found = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(found), ctypes.c_int(kind), self._device)
        return found.value

    def _copy(self, name: str, places: tuple[Any, Any], nbytes: int, stream: int) -> None:
        self._here(name, *places, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def _here(self, name: str, *arguments: Any) -> None:
        """Call with the device's context current on this thread."""
        self._call("cuCtxSetCurrent", self._context)
        self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != SUCCESS:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            reason = text.value.decode() if text.value else "an error without a name"
            raise DriverError(f"{name}: {reason} ({code})")


class Handle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * IPC_BYTES),)


# Of arguments to kernels, by triton's names.
SCALARS: Mapping[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


def _value(pointer: ctypes.c_void_p) -> int:
    return pointer.value or 0
