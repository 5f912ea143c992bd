"""Stand-ins for what SGLang's cache modules import and a machine without a GPU lacks.

`install` must come before the first import of sglang. What is stood in for is never called by the
host pools on a CPU; the modules under test are SGLang's own.
"""

import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

ABSENT = (
    "aiohttp",
    "compressed_tensors",
    "deep_gemm",
    "flashinfer",
    "gguf",
    "sentencepiece",
    "sgl_kernel",
    "starlette",
    "tilelang",
    "torchvision",
    "triton",
    "tvm_ffi",
)


class Nothing:
    """Takes any call and gives any attribute; as a decorator it leaves the function alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else Nothing()

    def __getattr__(self, name: str) -> Any:
        return nothing(name)


class Absent(types.ModuleType):
    """A module whose every name is a class that does nothing."""

    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        return nothing(name)


def nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    kind = type("Kind", (type,), {"__getattr__": lambda cls, name: nothing(name)})
    return kind(name, (Nothing,), {})


class Finder:
    """Finds the modules of ABSENT, and loads nothing for them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Stand in for what is absent, after transformers has looked for what is there."""
    import transformers.utils

    for name in dir(transformers.utils):
        if name.startswith("is_") and name.endswith("_available"):
            try:
                getattr(transformers.utils, name)()
            except TypeError:
                pass  # one that asks for a version
    sys.meta_path.insert(0, Finder())  # type: ignore
