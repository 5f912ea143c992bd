"""Loops over columns: compiled where numba is installed (extra `[cpu]`), plain Python where not.

One source serves both: functions that take flat one-dimensional columns and integers only. Plain
Python reads a memoryview three times faster than a numpy array, so columns are passed through
`column`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., object])
Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


def _numba() -> ModuleType | None:
    try:
        return importlib.import_module("numba")
    except ImportError:  # absent, or it does not fit this numpy
        return None


NUMBA = _numba()
NATIVE = NUMBA is not None


def compiled(function: Function) -> Function:
    """Compile a loop with numba where it is installed; the result is kept on disk if it can be.

    Where it can be found out only then that it cannot (a full disk), a loop's first call raises
    OSError, and the next ones work: see `store.exercise`.
    """
    if NUMBA is None:
        return function
    try:
        return cast(Function, NUMBA.njit(cache=True)(function))
    except RuntimeError:  # no directory that the result could be written to
        return cast(Function, NUMBA.njit(function))


def column(array: Int32s) -> Int32s:
    """Return a flat array in the form that the loops read fastest."""
    # The memoryview stands in for the array: it is indexed and assigned to in the same way.
    return array if NATIVE else cast(Int32s, array.data)


def column64(array: Int64s) -> Int64s:
    """Return a flat array of 64-bit integers in the form that the loops read fastest."""
    return array if NATIVE else cast(Int64s, array.data)
