"""Modules of compiled loops as they are without numba: fresh copies, plain Python."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

KINDS = ("native", "plain")


def load(name: str, kind: str) -> ModuleType:
    """The module `name` with its loops `native` (numba must be there) or `plain`."""
    if kind == "native":
        return importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        compiled = fresh("kvengine.compiled")
        assert not compiled.NATIVE
        patch.setitem(sys.modules, "kvengine.compiled", compiled)
        # What it is made of is plain as well, and is put away again.
        whole = {n: m for n, m in sys.modules.items() if n.startswith("kvengine.policy.")}
        for other in whole:
            del sys.modules[other]
        try:
            return fresh(name)
        finally:
            for other in [n for n in sys.modules if n.startswith("kvengine.policy.")]:
                del sys.modules[other]
            sys.modules.update(whole)


def fresh(name: str) -> ModuleType:
    """A second copy of a module, in no table of modules."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
