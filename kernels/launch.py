"""Find the fast paths of this installation, and launch kernels on a device, with torch or without.

A `Launcher` runs Triton kernels in the order of one stream. `Torch` is for processes that have
torch: triton's own launcher on torch's current stream. `Bare` needs no framework, so a JAX process
can use the kernels: it compiles ahead of the launch for the device that the driver names, and
launches through the driver. Nothing optional is imported before its use.
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import re
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvengine.kernels import build
from kvengine.kernels.build import Variant
from kvengine.kernels.driver import SCALARS, Cuda, Driver

WARP = 32
NAMES: Mapping[str, str] = {  # numpy's, and what triton calls them
    "int64": "i64",
    "uint64": "u64",
    "int32": "i32",
    "uint32": "u32",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

Table = npt.NDArray[Any]
Grid = tuple[int, ...]


class Launcher(Protocol):
    """Runs kernels on one device, each after the one before.

    What `table` and `empty` give is an argument of kernels: memory of the device that is not
    reused before the launches it was given to are over.
    """

    name: str

    def table(self, array: Table) -> Any:
        """Copy a table of the host to the device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: type) -> Any:
        """Give memory with any bytes in it."""
        ...

    def read(self, memory: Any) -> Table:
        """Wait for all launches, and copy what `empty` gave to the host."""
        ...

    def run(
        self,
        kernel: Any,  # triton's JITFunction has no types
        grid: Grid,
        arguments: Sequence[Any],
        constants: Mapping[str, object],
        num_warps: int = 4,
    ) -> None:
        """Launch. arguments: all that are no constants, in the kernel's order: integers, and
        memory (what `table` and `empty` give; whatever has `data_ptr()` and `dtype`)."""
        ...


class Torch:
    """Launch by triton's own launcher, on torch's current stream of `device` (torch's name of it).

    "cpu" is the interpreter: TRITON_INTERPRET=1 must be set before a kernel is imported.
    """

    def __init__(self, device: str) -> None:
        self.name = device
        self._torch = importlib.import_module("torch")

    def table(self, array: Table) -> Any:
        """Copy a table to a tensor."""
        if not array.flags.writeable:
            array = array.copy()  # torch warns of tables that it might write to
        return self._torch.from_numpy(array).to(self.name)

    def empty(self, shape: tuple[int, ...], dtype: type) -> Any:
        """Give an empty tensor."""
        kind = getattr(self._torch, np.dtype(dtype).name)
        return self._torch.empty(shape, dtype=kind, device=self.name)

    def read(self, memory: Any) -> Table:
        """Copy a tensor to the host."""
        return np.asarray(memory.cpu())

    def run(
        self,
        kernel: Any,
        grid: Grid,
        arguments: Sequence[Any],
        constants: Mapping[str, object],
        num_warps: int = 4,
    ) -> None:
        """Compile on first use, and launch."""
        with self._on_device():
            kernel[grid](*arguments, **constants, num_warps=num_warps, **build.OPTIONS)

    def _on_device(self) -> contextlib.AbstractContextManager[None]:
        """Make the device torch's current one: triton launches on that, whatever it is given."""
        if self.name == "cpu":
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[None] = self._torch.cuda.device(self.name)
        return found


class Memory:
    """Device memory of a `Bare` launcher; given back, in its stream's order, with the object."""

    def __init__(self, bare: "Bare", shape: tuple[int, ...], dtype: type) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self._bare = bare
        self._address = 0
        self._address = bare.driver.lend(max(1, self.nbytes), bare.stream)

    def data_ptr(self) -> int:
        """Return the address."""
        return self._address

    def __del__(self) -> None:
        if self._address:
            self._bare.driver.give_back(self._address, self._bare.stream)
            self._address = 0


class Bare:
    """Launch through the driver alone, on `stream` (a handle of the driver; 0 the default one).

    A kernel is compiled on its first use with arguments of these types and this alignment, or
    taken from triton's cache. All methods may be called from any thread.
    """

    def __init__(self, driver: Driver, stream: int = 0, name: str = "cuda") -> None:
        self.driver, self.stream, self.name = driver, stream, name
        self._lock = threading.Lock()
        self._loaded: dict[tuple[object, ...], Loaded] = {}

    def table(self, array: Table) -> Memory:
        """Copy a table to the device, in the stream's order."""
        array = np.ascontiguousarray(array)
        memory = Memory(self, array.shape, array.dtype.type)
        if array.nbytes:
            address = array.ctypes.data
            self.driver.upload(memory.data_ptr(), address, array.nbytes, self.stream)
        return memory

    def empty(self, shape: tuple[int, ...], dtype: type) -> Memory:
        """Give device memory."""
        return Memory(self, shape, dtype)

    def read(self, memory: Memory) -> Table:
        """Copy device memory to the host, and wait for it."""
        found = np.empty(memory.shape, memory.dtype)
        self.driver.download(found.ctypes.data, memory.data_ptr(), found.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return found

    def run(
        self,
        kernel: Any,
        grid: Grid,
        arguments: Sequence[Any],
        constants: Mapping[str, object],
        num_warps: int = 4,
    ) -> None:
        """Compile on first use, and launch. Raises DriverError where the driver refuses."""
        names = [name for name in kernel.arg_names if name not in constants]
        if len(names) != len(arguments):
            raise ValueError(
                f"{kernel.__name__} takes {', '.join(names)}, got {len(arguments)} arguments"
            )
        signature = dict(zip(names, map(kind_of, arguments), strict=True))
        aligned = tuple(
            name
            for name, given in zip(names, arguments, strict=True)
            if hasattr(given, "data_ptr") and given.data_ptr() % build.DIVISOR == 0
        )
        loaded = self._load(kernel, signature, dict(constants), aligned, num_warps)
        values = [
            ctypes.c_uint64(given.data_ptr())
            if hasattr(given, "data_ptr")
            else SCALARS[signature[name]](given)
            for name, given in zip(names, arguments, strict=True)
        ]
        values += [ctypes.c_uint64(0)] * loaded.scratch
        x, y, z = (*grid, 1, 1)[:3]
        self.driver.launch(
            loaded.function,
            (x, y, z),
            WARP * num_warps,
            loaded.shared_bytes,
            self.stream,
            values,
        )

    def _load(
        self,
        kernel: Any,
        signature: dict[str, str],
        constants: dict[str, object],
        aligned: tuple[str, ...],
        num_warps: int,
    ) -> "Loaded":
        place = (kernel, *signature.values(), *constants.items(), aligned, num_warps)
        with self._lock:
            if place not in self._loaded:
                variant = Variant(kernel.__name__, kernel, signature, constants, aligned, num_warps)
                self._loaded[place] = Loaded(self.driver, variant)
            return self._loaded[place]


class Loaded:
    """A kernel in the device's memory."""

    def __init__(self, driver: Driver, variant: Variant) -> None:
        made = build.machine(variant, "cuda", driver.capability(), WARP)
        if made.metadata.global_scratch_size:
            raise ValueError(f"{variant.name} needs scratch memory, which is not given here")
        self.shared_bytes = int(made.metadata.shared)
        self.function = driver.load(made.asm["cubin"], made.metadata.name, self.shared_bytes)
        # beside its own the kernel has pointers to scratch memory: as many as its listing says
        entry = re.search(r"\.entry[^(]*\(([^)]*)\)", made.asm["ptx"])
        assert entry is not None
        self.scratch = entry[1].count(".param") - len(variant.signature)
        assert 0 <= self.scratch <= 2


def kind_of(argument: Any) -> str:
    """Return triton's name of an argument's type. Raises TypeError for what kernels do not take."""
    if hasattr(argument, "data_ptr"):
        name = str(argument.dtype).rpartition(".")[2]
        if name in NAMES:
            return f"*{NAMES[name]}"
    elif isinstance(argument, int) and not isinstance(argument, bool):
        return "i32" if -(1 << 31) <= argument < 1 << 31 else "i64"
    raise TypeError(f"{argument!r} is no argument of a kernel: give integers and device memory")


def expect_memory(name: str, memory: Any, item_bytes: int, count: int) -> None:
    """Raise ValueError unless device memory is contiguous and has at least `count` elements."""
    compact = memory.is_contiguous() if hasattr(memory, "is_contiguous") else True
    if not compact or memory.dtype.itemsize != item_bytes or math.prod(memory.shape) < count:
        raise ValueError(
            f"{name} is {memory.dtype}{list(memory.shape)}{'' if compact else ', not contiguous'}: "
            f"expected contiguous memory of {count} elements of {item_bytes} bytes"
        )


def launcher(device: str | Launcher) -> Launcher:
    """Give what launches on `device`: "cpu" (the interpreter), or torch's name of a GPU.

    A Launcher is given back as it is. Raises ValueError for another name, ImportError where
    neither torch nor a CUDA driver is there.
    """
    if not isinstance(device, str):
        return device
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise ValueError(f"device {device!r}, expected 'cpu', 'cuda' or 'cuda:0'")
    if kind == "cpu" or _torch_has_gpus():
        return Torch(device)
    return bare(int(index or 0))


def _torch_has_gpus() -> bool:
    """Tell whether torch is here, and was built for GPUs."""
    return available("torch") and bool(importlib.import_module("torch").cuda.is_available())


@functools.cache
def bare(index: int) -> Bare:
    """Give the launcher of a CUDA device without torch, on its default stream."""
    return Bare(Cuda(index), name=f"cuda:{index}")


def available(package: str) -> bool:
    """Tell whether the top-level `package` is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


@functools.cache
def native() -> ModuleType | None:
    """Load the compiled CPU path, or return None where numba is absent or does not import.

    The first call takes the time that numba takes to import; the very first of an installation
    also compiles. Call it where that time does not hurt. Safe from several threads.
    """
    if not available("numba"):
        return None
    try:
        return importlib.import_module("kvengine.kernels.native")
    except ImportError:  # a numba that does not fit this numpy says so when it is imported
        return None


@functools.cache
def _quantizers() -> ModuleType | None:
    """Load the compiled CPU path of the lossy codecs, as `native` does."""
    if native() is None:
        return None
    return importlib.import_module("kvengine.kernels.quant_native")


@functools.cache
def _coders() -> ModuleType | None:
    """Load the compiled CPU path of lossless coding, as `native` does."""
    if native() is None:
        return None
    return importlib.import_module("kvengine.kernels.lossless_native")


def coders(wanted: bool | None) -> ModuleType | None:
    """Choose the compiled path of lossless coding, as `choose` does."""
    return None if choose(wanted) is None else _coders()


def quantizers(wanted: bool | None) -> ModuleType | None:
    """Choose the compiled path of the lossy codecs, as `choose` does."""
    return None if choose(wanted) is None else _quantizers()


def load_quantizer(scheme: str) -> None:
    """Compile or load a lossy codec's path ahead of its first use."""
    found = quantizers(None)
    if found is not None:
        found.load(scheme)


def choose(wanted: bool | None) -> ModuleType | None:
    """Return the compiled path for None (where there is one) or True (raises ImportError)."""
    if wanted is False:
        return None
    found = native()
    if found is None and wanted:
        raise ImportError("native=True needs numba, which does not import: install kvengine[cpu]")
    return found
