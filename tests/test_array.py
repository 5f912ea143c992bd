"""Arrays in and out by DLPack: every dtype, stride, alignment, read-only case and lifetime."""

import ctypes
import gc
import sys
import threading
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvengine.adapters.array import DEVICES, DTYPES, View, export, view
from kvengine.errors import LayoutError

ROUNDS = 10_000
# What each framework has of the dtypes that DLPack carries.
TORCH = [
    name for name in DTYPES if name not in ("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz")
]
JAX = [name for name in DTYPES if name not in ("complex32", "complex128") and "64" not in name]
NUMPY = [name for name in DTYPES if not name.startswith(("bfloat", "float8", "complex32"))]
ML_DTYPES = [name for name in DTYPES if name.startswith(("bfloat", "float8"))]
COUNTING = np.arange(3 * 4 * 16, dtype=np.uint8)
# (index of a [4, 6, 8] array) -> its strides in elements
SLICES: list[tuple[Any, tuple[int, ...]]] = [
    ((slice(None), slice(None), slice(None)), (48, 8, 1)),
    ((slice(None), slice(1, 4), slice(None)), (48, 8, 1)),
    ((slice(None), slice(None), slice(0, 8, 3)), (48, 8, 3)),
    ((slice(1, 4, 2), slice(None), slice(2, 5)), (96, 8, 1)),
    ((2, slice(None), slice(None)), (8, 1)),
    ((slice(None), 5, 7), (48,)),
    ((3, 5, 7), ()),
]


def content(found: View) -> bytes:
    """The elements of a view in order, read by nothing but its address and strides."""
    at = [found.address]
    for size, step in zip(found.shape, found.strides, strict=True):
        at = [address + index * step for address in at for index in range(size)]
    return b"".join(ctypes.string_at(address, found.itemsize) for address in at)


def torch_array(torch: ModuleType, dtype: str) -> Any:
    """A [4, ...] tensor of counting bytes; torch allocates at multiples of 64."""
    plain = torch.empty(COUNTING.size, dtype=torch.uint8)
    plain[:] = torch.from_numpy(COUNTING) % 2 if dtype == "bool" else torch.from_numpy(COUNTING)
    return plain.view(getattr(torch, dtype)).reshape(4, 3, -1)


class MockArray:
    """A mock of an array: a hand-made capsule, its producer's destructor counted, calls recorded.

    The tensor is float32[2, 3] with no strides (compact), `byte_offset` into its memory.
    """

    def __init__(
        self,
        *,
        versioned: bool = True,
        device: int = 1,
        dtype: tuple[int, int, int] = (2, 32, 1),
        flags: int = 0,
        major: int = 1,
        name: bytes | None = None,
        byte_offset: int = 4,
    ) -> None:
        self.versioned, self.device, self.name = versioned, device, name
        self.memory = np.arange(8, dtype=np.float32)
        self.shape = np.array([2, 3], dtype=np.int64)
        data, shape = self.memory.ctypes.data, self.shape.ctypes.data
        code, bits, lanes = dtype
        packed = code | bits << 8 | lanes << 16
        tensor = [data, device | 7 << 32, 2 | packed << 32, shape, 0, byte_offset]
        self.header = (ctypes.c_uint64 * 10)(*([major, 0, 0, flags] if versioned else []), *tensor)
        self.calls: list[dict[str, object]] = []
        self.deleted = 0
        valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
            ("PyCapsule_IsValid", ctypes.pythonapi)
        )
        self.label = name or (b"dltensor_versioned" if versioned else b"dltensor")

        def destroy(capsule: int) -> None:
            self.deleted += valid(capsule, self.label)

        self.destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(destroy)
        # Never freed: a capsule may outlive all names of the mock, and a destructor cannot free
        # the callback that it runs in.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 7

    def __dlpack__(self, **asked: object) -> object:
        self.calls.append(asked)
        if not self.versioned and "max_version" in asked:
            raise TypeError("unexpected keyword argument 'max_version'")
        make = ctypes.PYFUNCTYPE(
            ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
        )(("PyCapsule_New", ctypes.pythonapi))
        destroy = ctypes.cast(self.destroy, ctypes.c_void_p)
        capsule: object = make(ctypes.addressof(self.header), self.label, destroy)
        return capsule


@pytest.mark.parametrize("dtype", TORCH)
def test_torch_dtypes_in_and_out(require: Any, dtype: str) -> None:
    torch = require("torch")
    array = torch_array(torch, dtype)
    found = view(array, writable=True)
    itemsize = array.element_size()
    assert found.address == array.data_ptr()
    assert (found.dtype, found.itemsize, found.device) == (dtype, itemsize, ("cpu", 0))
    assert found.shape == tuple(array.shape)
    assert found.strides == tuple(step * itemsize for step in array.stride())
    assert not found.readonly
    assert found.nbytes == COUNTING.nbytes
    assert content(found) == bytes(array.view(torch.uint8).numpy().tobytes())
    back = torch.from_dlpack(export(found))
    assert (back.dtype, back.data_ptr(), back.shape) == (array.dtype, array.data_ptr(), array.shape)


@pytest.mark.parametrize("dtype", JAX)
def test_jax_dtypes_in_and_out(require: Any, dtype: str) -> None:
    jax, torch = require("jax"), require("torch")
    known = require("ml_dtypes") if dtype in ML_DTYPES else np
    array = jax.numpy.asarray(np.ones((4, 6), dtype=getattr(known, dtype)))
    found = view(array)
    assert found.address == array.unsafe_buffer_pointer()
    assert (found.dtype, found.itemsize) == (dtype, array.dtype.itemsize)
    assert (found.shape, found.readonly) == ((4, 6), True)
    assert content(found) == np.asarray(array).tobytes()
    if dtype in TORCH:
        source = torch_array(torch, dtype)
        back = jax.dlpack.from_dlpack(export(view(source)), copy=False)
        assert back.unsafe_buffer_pointer() == source.data_ptr()
        assert str(back.dtype) == dtype
        assert np.asarray(back).tobytes() == content(view(source))


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_dtypes_in_and_out(dtype: str) -> None:
    plain = COUNTING % 2 if dtype == "bool" else COUNTING.copy()
    array = plain.view(dtype).reshape(4, -1)
    found = view(array, writable=True)
    assert found.address == array.ctypes.data
    assert (found.dtype, found.itemsize, found.device) == (dtype, array.itemsize, ("cpu", 0))
    assert (found.shape, found.strides) == (array.shape, array.strides)
    assert content(found) == array.tobytes()
    back = np.from_dlpack(export(found))
    assert (back.dtype, back.ctypes.data) == (array.dtype, array.ctypes.data)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ML_DTYPES)
def test_numpy_with_ml_dtypes(require: Any, dtype: str) -> None:
    array = COUNTING.copy().view(getattr(require("ml_dtypes"), dtype)).reshape(4, -1)[:, ::2]
    found = view(array, writable=True)
    assert (found.dtype, found.itemsize) == (dtype, array.itemsize)
    assert content(found) == array.tobytes()
    if dtype in TORCH:
        torch = require("torch")
        back = torch.from_dlpack(export(found))
        assert (back.dtype, back.data_ptr()) == (getattr(torch, dtype), array.ctypes.data)
        back.fill_(1)
        assert np.all(array == 1)


@pytest.mark.parametrize(("index", "strides"), SLICES)
def test_strides(require: Any, index: Any, strides: tuple[int, ...]) -> None:
    torch = require("torch")
    plain = np.arange(4 * 6 * 8, dtype=np.int32).reshape(4, 6, 8)
    for array in (plain[index], torch.from_numpy(plain)[index]):
        if not isinstance(array, np.generic):
            found = view(array)
            assert found.strides == tuple(step * 4 for step in strides)
            assert content(found) == plain[index].tobytes()
            for back in (np.from_dlpack(export(found)), torch.from_dlpack(export(found)).numpy()):
                assert back.tobytes() == plain[index].tobytes()


def test_transposed_and_expanded(require: Any) -> None:
    torch = require("torch")
    array = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    turned = view(array.permute(2, 0, 1))
    assert turned.strides == (4, 48, 16)
    assert content(turned) == array.permute(2, 0, 1).contiguous().numpy().tobytes()
    wide = view(array[:, :1].expand(2, 5, 4))
    assert wide.strides == (48, 0, 4)
    assert wide.nbytes == 160
    assert content(wide) == array[:, :1].expand(2, 5, 4).contiguous().numpy().tobytes()


def test_negative_strides() -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)[::-1, :, ::-2]
    found = view(array, writable=True)
    assert found.strides == (-24, 8, -4)
    assert content(found) == array.tobytes()
    assert np.from_dlpack(export(found)).tobytes() == array.tobytes()


def test_strides_that_are_no_multiple_of_an_element() -> None:
    records = np.zeros(5, dtype=[("kind", "u1"), ("value", "<f4")])
    records["value"] = range(5)
    found = view(records["value"])
    assert (found.strides, found.aligned(4)) == ((5,), False)
    assert content(found) == records["value"].tobytes()
    with pytest.raises(BufferError):
        np.from_dlpack(export(found))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2), (1, 1), (1,) * 12])
def test_empty_and_small_shapes(require: Any, shape: tuple[int, ...]) -> None:
    torch, jax = require("torch"), require("jax")
    for array in (np.zeros(shape, "f4"), torch.zeros(shape), jax.numpy.zeros(shape)):
        found = view(array)
        assert (found.shape, len(found.strides)) == (shape, len(shape))
        assert found.nbytes == 4 * np.prod(shape)
        assert content(found) == bytes(found.nbytes)
        if not found.readonly:
            assert np.from_dlpack(export(found)).shape == shape
            assert tuple(torch.from_dlpack(export(found)).shape) == shape


@pytest.mark.parametrize("offset", range(64))
def test_alignment(require: Any, offset: int) -> None:
    torch, jax = require("torch"), require("jax")
    memory = torch.arange(64 + 4 * 64, dtype=torch.int32).to(torch.uint8)
    array = memory[offset : offset + 256].reshape(4, 64)
    found = view(array)
    assert found.address == memory.data_ptr() + offset
    assert all(found.aligned(n) == (offset % n == 0) for n in (1, 2, 4, 8, 16, 32, 64))
    if offset % 4 == 0:
        words = np.frombuffer(memory.numpy(), "<u4", 64, offset)
        assert content(view(words)) == array.numpy().tobytes()
    back = torch.from_dlpack(export(found))
    assert back.data_ptr() == array.data_ptr()
    if offset == 0:
        jax.dlpack.from_dlpack(export(found), copy=False)
    else:
        with pytest.raises(ValueError, match="aligned"):
            jax.dlpack.from_dlpack(export(found), copy=False)


def test_select() -> None:
    array = np.arange(2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4)[:, ::-1]
    found = view(array)
    for axis in (-3, -2, -1, 0, 1, 2):
        for index in range(-array.shape[axis], array.shape[axis]):
            assert content(found.select(axis, index)) == np.take(array, index, axis).tobytes()
    assert content(found.select(0, 1).select(1, 2)) == array[1, :, 2].tobytes()
    assert found.select(0, 1).owner is found.owner
    for axis, index in ((3, 0), (-4, 0), (0, 2), (1, -4)):
        with pytest.raises(IndexError):
            found.select(axis, index)


def test_compact() -> None:
    array = np.zeros((4, 6, 8), "f4")
    assert [view(array).compact(axes) for axes in range(4)] == [True] * 4
    assert [view(array[:, 1:3]).compact(axes) for axes in range(4)] == [True, True, True, False]
    assert [view(array[:, :, 1:3]).compact(axes) for axes in range(4)] == [True, True, False, False]
    assert [view(array[:, :, ::2]).compact(axes) for axes in range(3)] == [True, False, False]
    assert view(array[:1, 1:3]).compact(3)
    assert view(array[::2, :1]).compact(2)
    assert not view(array.transpose(0, 2, 1)).compact(1)


def test_require() -> None:
    found = view(np.zeros((4, 6, 8), "f4"))
    assert found.require("K", dtype="float32", shape=(None, 6, 8), device=("cpu", 0)) is found
    for message, wanted in (
        ("K has dtype float32, expected bfloat16", {"dtype": "bfloat16"}),
        (r"K has shape \[4, 6, 8\], expected \[any, 8, 6\]", {"shape": (None, 8, 6)}),
        (r"K has shape \[4, 6, 8\], expected \[4, 6\]", {"shape": (4, 6)}),
        ("K lies on cpu:0, expected cuda:1", {"device": ("cuda", 1)}),
    ):
        with pytest.raises(LayoutError, match=message):
            found.require("K", **wanted)
    with pytest.raises(LayoutError, match="the last 2 axes without gaps"):
        view(np.zeros((4, 6, 8), "f4")[:, :, 1:]).require("K", compact_axes=2)
    with pytest.raises(LayoutError, match="multiples of 64 bytes"):
        view(np.zeros((4, 6, 9), "f4")).require("K", alignment=64)


def test_read_only(require: Any) -> None:
    torch, jax = require("torch"), require("jax")
    sealed = np.frombuffer(b"read-only memory", np.uint8)
    found = view(sealed)
    assert found.readonly
    assert content(found) == b"read-only memory"
    with pytest.raises(LayoutError, match="numpy.ndarray is read-only.*pass a writable array"):
        view(sealed, writable=True)
    assert not np.from_dlpack(export(found)).flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        jax.dlpack.from_dlpack(export(found), copy=False)  # asks for the unversioned form
    array = jax.numpy.zeros(4)
    assert view(array).readonly
    with pytest.raises(LayoutError, match="immutable.*the jax adapter"):
        view(array, writable=True)
    assert view(MockArray(flags=1)).readonly
    with pytest.raises(LayoutError, match="MockArray is read-only"):
        view(MockArray(flags=1), writable=True)
    assert not view(torch.zeros(3), writable=True).readonly


def test_elements_that_share_memory_are_not_written(require: Any) -> None:
    torch = require("torch")
    for array in (
        torch.zeros(4, 1).expand(4, 3),
        torch.zeros(9).as_strided((4, 4), (1, 1)),
        torch.zeros(99).as_strided((2, 3, 4), (8, 3, 1)),
        np.broadcast_to(np.zeros(3), (2, 3)).view(),
    ):
        assert view(array).nbytes
        with pytest.raises(LayoutError, match="share memory|read-only"):
            view(array, writable=True)
    for array in (torch.zeros(0, 4).expand(0, 4), torch.zeros(3, 1).expand(3, 1), torch.zeros(())):
        view(array, writable=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("torch.zeros(3, requires_grad=True)", r"torch.Tensor .*pass tensor.detach\(\)"),
        ("torch.zeros(3, dtype=torch.complex64).conj()", "conjugate"),
        ("torch.zeros(3, dtype=torch.complex64).conj().imag", "resolve_neg"),
        ("torch.zeros(3).to_sparse()", "strided"),
        ("torch.zeros(3, device='meta')", "meta"),
        ("torch.empty(4, dtype=torch.float4_e2m1fn_x2)", "4 bits, 2 lanes.*pass its bytes"),
        ("torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)", "QInt"),
        ("torch.Tensor", "not an array"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_that_cannot_be_seen(require: Any, make: str, message: str) -> None:
    torch = require("torch")
    if "float4" in make and not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("needs a torch with float4_e2m1fn_x2")
    array = eval(make, {"torch": torch})  # noqa: S307  # a case of the table above
    with pytest.raises(LayoutError, match=message):
        view(array)


def test_other_things_that_cannot_be_seen(require: Any) -> None:
    ml_dtypes, jax = require("ml_dtypes"), require("jax")
    for thing, message in (
        ([1, 2], "builtins.list is not an array.*pass a torch.Tensor"),
        (None, "NoneType is not an array"),
        (bytearray(4), "numpy.frombuffer"),
        (np.float32(1), "not an array"),
        (np.zeros(3, ">f4"), r"float32 \(>f4\).*native byte order"),
        (np.zeros(3, "M8[s]"), "datetime64"),
        (np.zeros(3, [("a", "i4")]), "void32"),
        (np.zeros(3, object), "object"),
        (np.zeros(3, "S4"), "bytes32"),
        (np.ma.zeros(3), "MaskedArray"),
        (np.zeros(3, ml_dtypes.int4), "int4"),
        (np.zeros(3, ml_dtypes.float4_e2m1fn), "float4_e2m1fn"),
        (jax.numpy.zeros(4, ml_dtypes.float4_e2m1fn), "4 bits"),
        (jax.numpy.zeros(4, "int4"), "no DLPack equivalent"),
    ):
        with pytest.raises(LayoutError, match=message):
            view(thing)
    gone = jax.numpy.zeros(4)
    gone.delete()
    with pytest.raises(LayoutError, match="deleted"):
        view(gone)


@pytest.mark.parametrize("versioned", [True, False])
def test_both_capsules_without_strides(versioned: bool) -> None:
    mock = MockArray(versioned=versioned)
    found = view(mock, writable=True)
    assert found.address == mock.memory.ctypes.data + 4
    assert (found.shape, found.strides, found.device) == ((2, 3), (12, 4), ("cpu", 7))
    assert content(found) == mock.memory[1:7].tobytes()
    assert mock.deleted == 0
    selected = found.select(0, 0)
    del found
    assert mock.deleted == 0
    del selected
    assert mock.deleted == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": (2, 32, 4)}, "32 bits, 4 lanes"),
        ({"dtype": (17, 4, 1)}, "code 17, 4 bits"),
        ({"dtype": (3, 64, 1)}, "code 3, 64 bits"),
        ({"dtype": (0, 4, 1)}, "code 0, 4 bits"),
        ({"major": 2}, "DLPack 2.0, expected 1.x"),
        ({"flags": 2}, "gave a copy"),
        ({"name": b"used_dltensor"}, "capsule named b'used_dltensor'"),
        ({"device": 8}, "'metal', expected one of cpu, cuda"),
        ({"device": 14}, "'oneapi'"),
        ({"device": 99}, "kind 99"),
    ],
)
def test_capsules_that_are_refused_are_deleted(given: dict[str, Any], message: str) -> None:
    mock = MockArray(**given)
    with pytest.raises(LayoutError, match=message):
        view(mock)
    gc.collect()
    assert mock.deleted == 1


def test_a_capsule_that_is_none() -> None:
    class MockOdd(MockArray):
        """A mock whose __dlpack__ breaks its promise."""

        def __dlpack__(self, **asked: object) -> object:
            return "no capsule"

    with pytest.raises(LayoutError, match="PyCapsule"):
        view(MockOdd())


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("name", DEVICES)
def test_devices_and_streams(name: str, versioned: bool) -> None:
    for stream in (None, -1, 1, 0x7F00):
        mock = MockArray(device=DEVICES[name], versioned=versioned)
        found = view(mock, stream=stream, writable=True)
        assert found.device == (name, 7)
        told = stream if name in ("cuda", "rocm", "cuda_managed") else None
        assert [call["stream"] for call in mock.calls] == [told] * len(mock.calls)
        assert export(found).__dlpack_device__() == (DEVICES[name], 7)
        assert view(export(found)).device == (name, 7)  # the capsule says so too


def test_export_refuses_what_it_cannot_give() -> None:
    shared = export(view(np.zeros((2, 3), "f4")))
    with pytest.raises(BufferError, match="never copied"):
        shared.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"lies on cpu:0 .* not on device \(2, 1\)"):
        shared.__dlpack__(dl_device=(2, 1))
    with pytest.raises(BufferError, match="never copied"):
        np.from_dlpack(shared, copy=True)
    assert np.from_dlpack(shared, device="cpu", copy=False).shape == (2, 3)


@pytest.mark.parametrize(
    ("max_version", "name"),
    [
        (None, "dltensor"),
        ((0, 8), "dltensor"),
        ((1, 0), "dltensor_versioned"),
        ((2, 1), "dltensor_versioned"),
    ],
)
def test_export_negotiates_the_version(max_version: tuple[int, int] | None, name: str) -> None:
    shared = export(view(np.zeros((2, 3), "f4")))
    assert f'"{name}"' in repr(shared.__dlpack__(max_version=max_version))


def test_a_view_keeps_the_memory(require: Any) -> None:
    torch, jax = require("torch"), require("jax")
    memory = np.arange(8, dtype=np.float32)
    gone = weakref.ref(memory)
    array = torch.from_numpy(memory)
    found = view(array)
    del memory, array
    gc.collect()
    assert gone() is not None
    assert content(found) == np.arange(8, dtype=np.float32).tobytes()
    found = found.select(0, 3)
    assert gone() is not None
    del found
    assert gone() is None
    array = jax.numpy.arange(1000)
    found = view(array)
    del array
    gc.collect()
    assert content(found) == np.arange(1000, dtype=np.int32).tobytes()


def test_a_consumer_keeps_the_memory(require: Any) -> None:
    torch, jax = require("torch"), require("jax")
    for consume in (
        torch.from_dlpack,
        np.from_dlpack,
        lambda shared: jax.dlpack.from_dlpack(shared, copy=False),
        lambda shared: shared.__dlpack__(),
        lambda shared: shared.__dlpack__(max_version=(1, 0)),
        lambda shared: view(shared),
    ):
        memory = np.zeros(32 + 16, dtype=np.float32)
        memory = memory[-memory.ctypes.data // 4 % 16 :][:32]  # jax wants a multiple of 64
        memory[:] = 5
        gone = weakref.ref(memory)
        held = consume(export(view(memory)))
        del memory
        gc.collect()
        assert gone() is not None
        if hasattr(held, "__dlpack__"):
            assert content(view(held)) == np.full(32, 5, np.float32).tobytes()
        del held
        gc.collect()
        assert gone() is None


def test_many_rounds_leak_nothing(require: Any) -> None:
    torch = require("torch")
    memory = np.zeros((1, 2) * 6, dtype=np.float32)
    array = torch.from_numpy(memory)

    def rounds(count: int) -> None:
        for _ in range(count):
            shared = export(view(array, writable=True))
            view(torch.from_dlpack(shared))
            np.from_dlpack(shared)
            shared.__dlpack__()
            shared.__dlpack__(max_version=(1, 0))

    rounds(ROUNDS // 10)
    references, blocks, pages = sys.getrefcount(memory), sys.getallocatedblocks(), resident()
    rounds(ROUNDS)
    assert sys.getrefcount(memory) == references
    assert sys.getallocatedblocks() - blocks < ROUNDS // 10
    assert resident() - pages < ROUNDS * 100


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_threads(require: Any) -> None:
    torch = require("torch")
    memory = np.arange(64, dtype=np.float32)
    array = torch.from_numpy(memory)
    references = sys.getrefcount(memory)
    wanted = memory.tobytes()
    wrong: list[str] = []
    passed: list[View] = []

    def work() -> None:
        for _ in range(500):
            passed.append(view(array))
            found = passed.pop()  # often one that another thread has made, so it dies here
            back = torch.from_dlpack(export(found))
            del found
            if content(view(back)) != wanted:
                wrong.append("content")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    passed.clear()
    gc.collect()
    assert sys.getrefcount(memory) == references
