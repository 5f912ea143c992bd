"""Torch tensors out of views, and torch's paged caches in the forms of the engine."""

import gc
import subprocess
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvengine.adapters.array import view
from kvengine.errors import LayoutError


@pytest.fixture(scope="module")
def torch(require: Any) -> Any:
    return require("torch")


@pytest.fixture(scope="module")
def adapter(torch: ModuleType, require: Any) -> Any:
    return require("kvengine.adapters.torch")


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]
)
def test_tensor_shares_memory(torch: Any, adapter: Any, dtype: str) -> None:
    memory = np.zeros((4, 64), dtype=np.uint8)
    gone = weakref.ref(memory)
    cache = torch.from_numpy(memory).view(getattr(torch, dtype))
    shown = adapter.tensor(view(cache).select(0, 2))
    assert (shown.dtype, shown.shape) == (cache.dtype, cache[2].shape)
    shown.view(torch.uint8)[5] = 77
    assert memory[2, 5] == 77
    del memory, cache
    gc.collect()
    assert gone() is not None
    del shown
    assert gone() is None


def test_tensor_refuses_what_torch_cannot_say(adapter: Any) -> None:
    with pytest.raises(LayoutError, match="read-only"):
        adapter.tensor(view(np.frombuffer(b"sealed", np.uint8)))
    with pytest.raises(LayoutError, match="flip the array back"):
        adapter.tensor(view(np.zeros((2, 3))[:, ::-1]))
    assert adapter.tensor(view(np.zeros((1, 3))[::-1])).shape == (1, 3)


@pytest.mark.parametrize("axis", [0, 1, -4])
def test_pairs(torch: Any, adapter: Any, axis: int) -> None:
    shape = [7, 16, 3, 8]
    shape.insert(axis % 5, 2)
    caches = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(3)]
    for cache, (k, v) in zip(caches, adapter.pairs(caches, axis), strict=True):
        assert torch.equal(torch.stack([k, v], dim=axis), cache)
        assert k.data_ptr() == cache.data_ptr()
        assert view(v, writable=True).compact(3)


def test_pairs_of_another_shape(torch: Any, adapter: Any) -> None:
    for shape, axis in (((7, 16), 0), ((2, 7), 1), ((2,), 1), ((7, 2), -3)):
        with pytest.raises(LayoutError, match=r"layer 1 has shape .* expected 2 \(K and V\)"):
            adapter.pairs([torch.zeros(2, 2, 2), torch.zeros(shape)], axis)


def test_pages(torch: Any, adapter: Any) -> None:
    whole = torch.randn(6, 2, 3, 16, 8, dtype=torch.bfloat16)
    for cache in (whole, whole[:, 1], whole[::2, 0]):
        (page,) = adapter.pages([cache])
        assert page.dtype == torch.uint8
        assert page.shape == (cache.shape[0], cache[0].numel() * 2)
        assert page.data_ptr() == cache.data_ptr()
        assert torch.equal(page.view(torch.bfloat16).reshape(cache.shape), cache)
    for cache in (whole[:, :, 1:], whole.transpose(1, 2), torch.zeros(4)):
        with pytest.raises(LayoutError, match="layer 0 .* together"):
            adapter.pages([cache])
    (empty,) = adapter.pages([whole[:0]])
    assert empty.shape[0] == 0


def test_current_stream(torch: Any, adapter: Any) -> None:
    assert adapter.current_stream(torch.zeros(3)) is None


@pytest.mark.parametrize(
    ("handle", "hip", "stream"), [(0, None, 1), (4096, None, 4096), (0, "6.4", 0)]
)
def test_current_stream_of_a_device(
    torch: Any,
    adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    handle: int,
    hip: str | None,
    stream: int,
) -> None:
    class MockStream:
        """A mock of a CUDA stream."""

        cuda_stream = handle

    class MockTensor:
        """A mock of a tensor on a GPU."""

        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MockStream)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert adapter.current_stream(MockTensor) == stream


PROGRAM = """
import sys, torch
from kvengine.adapters.array import export, view
held = [torch.zeros(1000) for _ in range(50)]
views = [view(tensor) for tensor in held]
sys.views = views  # outlives the modules
sys.back = [torch.from_dlpack(export(found)) for found in views]
sys.unused = [export(found).__dlpack__() for found in views]
torch.kept = torch.from_dlpack(export(views[0]))
print("done")
"""


def test_exit_with_views_and_exports_alive(torch: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
