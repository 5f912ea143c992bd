"""Arrays of any framework in and out, by DLPack, without a copy and without the framework.

`view` reads where an array lies; `export` gives memory back as an object that torch, jax and numpy
take. The engine looks at caches through `View` only, so it works with all of them alike.
Source: the DLPack 1.3 C header and its Python specification
(https://dmlc.github.io/dlpack/latest/python_spec.html).
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol, cast

import numpy as np

from kvengine.errors import LayoutError

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

# name: (type code, bits) of a DLDataType
DTYPES: Final = {
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "complex32": (5, 32),
    "complex64": (5, 64),
    "complex128": (5, 128),
    "bool": (6, 8),
    "float8_e3m4": (7, 8),
    "float8_e4m3": (8, 8),
    "float8_e4m3b11fnuz": (9, 8),
    "float8_e4m3fn": (10, 8),
    "float8_e4m3fnuz": (11, 8),
    "float8_e5m2": (12, 8),
    "float8_e5m2fnuz": (13, 8),
    "float8_e8m0fnu": (14, 8),
}
# name: code of a DLDeviceType whose memory the engine can reach
DEVICES: Final = {
    "cpu": 1,
    "cuda": 2,
    "cuda_host": 3,
    "rocm": 10,
    "rocm_host": 11,
    "cuda_managed": 13,
}
OTHER_DEVICES: Final = {
    4: "opencl",
    7: "vulkan",
    8: "metal",
    9: "vpi",
    12: "extension",
    14: "oneapi",
    15: "webgpu",
    16: "hexagon",
    17: "maia",
    18: "trainium",
}
DTYPE_NAMES: Final = {code: name for name, code in DTYPES.items()}
DEVICE_NAMES: Final = {code: name for name, code in DEVICES.items()}
STREAM_DEVICES: Final = frozenset({"cuda", "rocm", "cuda_managed"})
# numpy types that stand for any element of so many bytes
PLAIN: Final = {1: "|u1", 2: "=u2", 4: "=u4", 8: "=u8", 16: "=c16"}

MAX_VERSION: Final = (1, 3)
VERSIONED: Final = b"dltensor_versioned"
UNVERSIONED: Final = b"dltensor"
READ_ONLY: Final = 1
COPIED: Final = 2
# data, device type, device id, axes, type code, bits, lanes, shape, strides, byte offset
TENSOR: Final = struct.Struct("@PiiiBBHPPQ")
# major, minor, manager context, deleter, flags; the tensor follows
HEADER: Final = struct.Struct("@IIPPQ")
DEVICE_OFFSET: Final = 8  # of the device type in TENSOR
DTYPE_OFFSET: Final = 20  # of the type code in TENSOR
FLAGS_OFFSET: Final = 24  # in HEADER

# Prototypes of our own: those in ctypes.pythonapi belong to whoever sets them last.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Array(Protocol):
    """Anything that speaks DLPack: a torch.Tensor, jax.Array, numpy.ndarray, cupy.ndarray, ..."""

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class View:
    """Say where the elements of an array lie. Made by `view`; holds the memory while it lives.

    `address` is that of element [0, ..., 0], in bytes; `strides` are in bytes and may be 0 or
    negative; those of axes with fewer than two elements mean nothing. `dtype` is torch's name
    for it, `device` a name of DEVICES and an index. Any thread may drop the last reference.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: tuple[str, int]
    readonly: bool
    owner: object = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, gaps between them not counted."""
        return math.prod(self.shape) * self.itemsize

    def select(self, axis: int, index: int) -> View:
        """Take one entry of `axis`, which the result no longer has, as `array[..., index]` does.

        Raises IndexError.
        """
        axes = len(self.shape)
        if not -axes <= axis < axes:
            raise IndexError(f"axis {axis} of an array with {axes} axes")
        axis %= axes
        size = self.shape[axis]
        if not -size <= index < size:
            raise IndexError(f"index {index} on axis {axis} of {size}")
        return replace(
            self,
            address=self.address + index % size * self.strides[axis],
            shape=self.shape[:axis] + self.shape[axis + 1 :],
            strides=self.strides[:axis] + self.strides[axis + 1 :],
        )

    def narrow(self, axis: int, first: int, last: int) -> View:
        """Take entries first..last of `axis`, the last excluded. Raises IndexError."""
        size = self.shape[axis]
        if not 0 <= first < last <= size:
            raise IndexError(f"{first}..{last} on axis {axis} of {size}")
        shape = list(self.shape)
        shape[axis] = last - first
        return replace(self, address=self.address + first * self.strides[axis], shape=tuple(shape))

    def aligned(self, alignment: int) -> bool:
        """Tell whether each entry of each axis but the last begins at a multiple of `alignment`."""
        steps = [
            step for step, size in zip(self.strides[:-1], self.shape[:-1], strict=True) if size > 1
        ]
        return not any(place % alignment for place in (self.address, *steps))

    def compact(self, axes: int) -> bool:
        """Tell whether the last `axes` axes are one run of bytes, in order and without gaps."""
        run = self.itemsize
        for size, step in zip(
            reversed(self.shape[len(self.shape) - axes :]), reversed(self.strides), strict=False
        ):
            if size > 1 and step != run:
                return False
            run *= size
        return True

    def require(
        self,
        name: str,
        *,
        dtype: str | None = None,
        shape: Sequence[int | None] | None = None,
        device: tuple[str, int] | None = None,
        compact_axes: int = 0,
        alignment: int = 1,
    ) -> View:
        """Return this view if it fits; the rest is what is expected of it, `name` what it is.

        `shape` may have None for an axis of any size; `compact_axes` is for `compact`,
        `alignment` (bytes) for `aligned`. Raises LayoutError naming the first that does not fit.
        """
        if dtype is not None and self.dtype != dtype:
            raise LayoutError(
                f"{name} has dtype {self.dtype}, expected {dtype}: "
                "describe the layout with the dtype of the cache, nothing is converted on the way"
            )
        if shape is not None and (
            len(shape) != len(self.shape)
            or any(want not in (None, size) for want, size in zip(shape, self.shape, strict=True))
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise LayoutError(
                f"{name} has shape {list(self.shape)}, expected [{wanted}]: "
                "pass it with its axes in the order that the layout names"
            )
        if device is not None and self.device != device:
            raise LayoutError(
                f"{name} lies on {_place(self.device)}, expected {_place(device)}: "
                "pass arrays of one device only"
            )
        if not self.compact(compact_axes):
            raise LayoutError(
                f"{name} of shape {list(self.shape)} has strides of {list(self.strides)} bytes, "
                f"expected the last {compact_axes} axes without gaps and in order: "
                "pass the cache itself, not a transposed or sliced form of it"
            )
        if not self.aligned(alignment):
            raise LayoutError(
                f"{name} at {self.address:#x} with strides of {list(self.strides)} bytes "
                f"does not keep to multiples of {alignment} bytes: "
                "allocate the cache by itself, not at an odd offset inside other memory"
            )
        return self


def view(array: object, *, writable: bool = False, stream: int | None = None) -> View:
    """Look at the memory of `array` without a copy, and keep it alive as long as the view.

    `array`: a View, or what has __dlpack__ (torch, jax, numpy, cupy …); of numpy also what DLPack
    does not carry (bfloat16 and float8 of ml_dtypes, read-only arrays). `writable` asks for memory
    that may be written. `stream`: the handle, as DLPack defines it, of the device stream that will
    use the memory: the array's pending work is made to come before it (CUDA: 1 is the default
    stream, -1 none; adapters.torch.current_stream gives it). Ignored for host memory.
    Raises LayoutError for what is not such an array: another dtype, device or layout, an array
    whose values are not those in memory, or with `writable` one that must not be written.
    """
    if isinstance(array, View):
        found = array
    elif isinstance(array, np.ndarray):
        found = _numpy_view(array)
    else:
        found = _dlpack_view(array, stream)
    if found.address == 0 and found.nbytes:
        raise LayoutError(f"{_kind(array)} has no memory: pass an array that is materialised")
    if writable:
        _check_writable(array, found)
    return found


@dataclass(frozen=True, slots=True)
class Export:
    """Memory as an array that any framework takes by DLPack. Made by `export`."""

    view: View

    def __dlpack_device__(self) -> tuple[int, int]:
        name, index = self.view.device
        return DEVICES[name], index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """Make a capsule; it, or who takes it, holds the view. `stream` is not waited for."""
        here = self.__dlpack_device__()
        if copy:
            raise BufferError("this memory is shared, never copied: pass copy=False or None")
        if dl_device is not None and tuple(dl_device) != here:
            raise BufferError(
                f"this memory lies on {_place(self.view.device)} (DLPack device {here}), "
                f"not on device {tuple(dl_device)}: move the result, not the export"
            )
        versioned = max_version is not None and max_version[0] >= 1
        if self.view.readonly and not versioned:
            raise BufferError(
                "this memory is read-only, which a capsule before DLPack 1.0 cannot say: "
                "ask with max_version=(1, 0) or copy it first"
            )
        # numpy's capsule, whose deleter takes the GIL and outlives the interpreter, with the
        # dtype and device that numpy does not know written over it.
        plain = np.asarray(_Memory(self.view))
        capsule: CapsuleType = plain.__dlpack__(max_version=max_version)
        base: int = _capsule_pointer(capsule, VERSIONED if versioned else UNVERSIONED)
        tensor = base + HEADER.size if versioned else base
        ctypes.memmove(tensor + DEVICE_OFFSET, struct.pack("@ii", *here), 8)
        ctypes.memmove(tensor + DTYPE_OFFSET, struct.pack("@BB", *DTYPES[self.view.dtype]), 2)
        if self.view.readonly:
            flags = ctypes.c_uint64.from_address(base + FLAGS_OFFSET)
            flags.value |= READ_ONLY
        return capsule


def export(view: View) -> Export:
    """Give a view back as an array, without a copy: an object for a framework's from_dlpack.

    `torch.from_dlpack(export(v))`; `jax.dlpack.from_dlpack(export(v), copy=False)`, which needs an
    address that is a multiple of 64, compact memory, and x64 mode for 64-bit integers (jax raises
    ValueError for the first two and narrows the last in silence); `np.from_dlpack(export(v))` for
    dtypes of numpy's own. The memory lives as long as the consumer's array. Work on a device is
    not waited for: export what a finished Transfer has written. A read-only view is exported to
    consumers of DLPack 1.0 only. The consumer gets BufferError for what cannot be given.
    """
    return Export(view)


class _Memory:
    """Shows a view to numpy, which holds it as the base of the array."""

    __slots__ = ("__array_interface__", "view")

    def __init__(self, view: View) -> None:
        self.view = view
        self.__array_interface__ = {
            "version": 3,
            "data": (view.address, False),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": np.dtype(PLAIN[view.itemsize]).str,
        }


def _numpy_view(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> View:
    """Read numpy's own description: DLPack knows no bfloat16 of ml_dtypes, numpy no other way."""
    dtype = array.dtype
    name = dtype.name
    if name not in DTYPES or not dtype.isnative or isinstance(array, np.ma.MaskedArray):
        raise LayoutError(
            f"{_kind(array)} of dtype {name} ({dtype.str}) cannot be stored, expected a plain "
            f"array of one of {', '.join(DTYPES)} in native byte order: convert it first, "
            "or pass its bytes with .view('uint8')"
        )
    address = array.__array_interface__["data"][0]
    readonly = not array.flags.writeable
    return View(
        address, array.shape, array.strides, name, dtype.itemsize, ("cpu", 0), readonly, array
    )


def _dlpack_view(array: object, stream: int | None) -> View:
    speaks = hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
    if not speaks or isinstance(array, type):
        raise LayoutError(
            f"{_kind(array)} is not an array, expected one with __dlpack__ and __dlpack_device__: "
            "pass a torch.Tensor, jax.Array or numpy.ndarray (numpy.frombuffer wraps a buffer)"
        )
    try:
        capsule = _ask(cast(Array, array), stream)
        name: bytes = _capsule_name(capsule)
        address: int = _capsule_pointer(capsule, name)
    except (BufferError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        advice = ": pass tensor.detach()" if getattr(array, "requires_grad", False) else ""
        raise LayoutError(
            f"{_kind(array)} gives no access to its memory{advice}: {error}"
        ) from error
    flags = 0
    if name == VERSIONED:
        major, minor, _, _, flags = HEADER.unpack(ctypes.string_at(address, HEADER.size))
        if major != MAX_VERSION[0]:
            raise LayoutError(
                f"{_kind(array)} speaks DLPack {major}.{minor}, expected {MAX_VERSION[0]}.x or the "
                "unversioned form: use a version of that framework that honours max_version"
            )
        address += HEADER.size
    elif name != UNVERSIONED:
        raise LayoutError(
            f"{_kind(array)} gave a capsule named {name!r}, expected a new one named "
            f"{VERSIONED!r} or {UNVERSIONED!r}"
        )
    if flags & COPIED:
        raise LayoutError(
            f"{_kind(array)} gave a copy of its memory: pass an array that can be shared"
        )
    # Nothing marks a jax array read-only, yet its memory is shared with all that was made from it.
    readonly = bool(flags & READ_ONLY) or _is_jax(array)
    # A capsule that nobody takes calls its deleter when it dies: exactly once, on any thread.
    return _parse(array, address, readonly, capsule)


def _ask(array: Array, stream: int | None) -> object:
    if hasattr(array, "is_neg") and array.is_neg():  # torch would forget the pending negation
        raise BufferError("its values are the negatives of its memory: pass tensor.resolve_neg()")
    if stream is not None:
        kind = DEVICE_NAMES.get(int(array.__dlpack_device__()[0]))
        stream = stream if kind in STREAM_DEVICES else None
    try:
        return array.__dlpack__(stream=stream, max_version=MAX_VERSION)
    except TypeError:  # from before DLPack 1.0
        return array.__dlpack__(stream=stream)


def _parse(array: object, address: int, readonly: bool, owner: object) -> View:
    data, device, device_id, axes, code, bits, lanes, shape_at, strides_at, offset = TENSOR.unpack(
        ctypes.string_at(address, TENSOR.size)
    )
    dtype = DTYPE_NAMES.get((code, bits))
    if dtype is None or lanes != 1:
        raise LayoutError(
            f"{_kind(array)} has a dtype (DLPack code {code}, {bits} bits, {lanes} lanes) that "
            f"cannot be stored, expected one of {', '.join(DTYPES)}: pass its bytes as uint8"
        )
    if device not in DEVICE_NAMES:
        raise LayoutError(
            f"{_kind(array)} lies on a device of kind {OTHER_DEVICES.get(device, device)!r}, "
            f"expected one of {', '.join(DEVICES)}: copy it to the CPU first"
        )
    itemsize = bits // 8
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    if axes:
        shape = struct.unpack(f"{axes}q", ctypes.string_at(shape_at, 8 * axes))
        if strides_at:
            steps = struct.unpack(f"{axes}q", ctypes.string_at(strides_at, 8 * axes))
            strides = tuple([step * itemsize for step in steps])
        else:
            strides = _compact_strides(shape, itemsize)
    place = (DEVICE_NAMES[device], device_id)
    return View(
        data + offset if data else 0, shape, strides, dtype, itemsize, place, readonly, owner
    )


def _compact_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


def _check_writable(array: object, found: View) -> None:
    if found.readonly:
        advice = (
            "jax arrays are immutable: load with the jax adapter, which returns new caches"
            if _is_jax(array)
            else "pass a writable array"
        )
        raise LayoutError(f"{_kind(array)} is read-only, expected memory to write to: {advice}")
    reach = found.itemsize
    steps = sorted((abs(step), size) for step, size in zip(found.strides, found.shape, strict=True))
    for step, size in steps if found.nbytes else []:
        if size > 1 and step < reach:
            raise LayoutError(
                f"{_kind(array)} of shape {list(found.shape)} with strides of "
                f"{list(found.strides)} bytes has elements that share memory, expected each to "
                "have its own: pass the array before it was expanded"
            )
        reach += step * (size - 1)


def _is_jax(array: object) -> bool:
    return type(array).__module__.partition(".")[0] in ("jax", "jaxlib")


def _kind(array: object) -> str:
    cls = type(array)
    return f"{cls.__module__}.{cls.__qualname__}"


def _place(device: tuple[str, int]) -> str:
    return f"{device[0]}:{device[1]}"
