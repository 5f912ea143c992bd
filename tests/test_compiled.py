"""kvengine.compiled: the loops run, whatever has become of numba and of the place for its cache."""

import resource

import numpy as np
import pytest

import loops
import rig
from kvengine import compiled

FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from kvengine import compiled
from kvengine.policy.named import policy_of
from kvengine.store import exercise
exercise(lambda: policy_of('lru'))
print(compiled.NATIVE)
"""
PLAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import rig, kvengine
from kvengine import compiled
from kvengine.kernels import launch
with kvengine.open("mem://?size=1M") as engine:
    of = rig.layout()
    keys = rig.names(engine, of).keys(rig.prompt(4, of))
    assert rig.save(engine, keys, rig.caches(of, 4, 1)).good.all()
    assert rig.check_right(engine, keys, rig.caches(of, 4, 1)).all()
print(compiled.NATIVE, launch.native())
"""


def double(count: int) -> int:
    return 2 * count


@pytest.fixture
def cache(require, monkeypatch, tmp_path):
    """Let numba keep what it compiles in a new directory, and nowhere else."""
    require("kvengine.kernels.native")  # compiled with the cache that it has
    config = require("numba").config
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator", raising=False)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return config


def compile_both(require):
    yield compiled.compiled(double)
    numba, native = require("numba"), require("kvengine.kernels.native")
    yield native._compiled(numba.types.int64(numba.types.int64))(double)


def test_compiled_code_is_kept(cache, require, tmp_path):
    for function in compile_both(require):
        assert function(21) == 42
    assert len(list(tmp_path.rglob("*.nbc"))) >= 1


def test_no_directory_for_compiled_code(cache, require, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "CACHE_DIR", str(tmp_path / "file" / "cache"))
    for function in compile_both(require):
        assert function(21) == 42
        assert function.signatures


def test_no_room_for_compiled_code(cache, require, tmp_path):
    """What only the first call finds out, `exercise` has found out before anyone calls."""
    native = require("kvengine.kernels.native")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        made = native._compiled(require("numba").types.int64(require("numba").types.int64))(double)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert made(21) == 42
    where = {
        "NUMBA_CACHE_DIR": str(tmp_path / "full"),
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    done = rig.python(FULL, **where)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert not [path for path in (tmp_path / "full").rglob("*.nbc") if path.stat().st_size]


def test_a_numba_that_does_not_import(tmp_path):
    """One that does not fit this numpy says so by an ImportError: plain Python it is."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    done = rig.python(PLAIN, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False None\n", "")


@pytest.mark.parametrize("kind", loops.KINDS)
def test_columns_are_the_arrays_themselves(require, kind):
    if kind == "native":
        require("numba")
    index = loops.load("kvengine.index", kind)
    for make, dtype in ((index.column, np.int32), (index.column64, np.int64)):
        array = np.arange(5, dtype=dtype)
        make(array)[3] = 77
        assert array.tolist() == [0, 1, 2, 77, 4]
