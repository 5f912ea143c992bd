"""Find the fast paths that this installation has. Nothing optional is imported before its use."""

import functools
import importlib.util
from types import ModuleType


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


def quantizers(wanted: bool | None) -> ModuleType | None:
    """Choose the compiled path of the lossy codecs, as `choose` does."""
    return None if choose(wanted) is None else _quantizers()


def choose(wanted: bool | None) -> ModuleType | None:
    """Return the compiled path for None (where there is one) or True (raises ImportError)."""
    if wanted is False:
        return None
    found = native()
    if found is None and wanted:
        raise ImportError("native=True needs numba, which does not import: install kvengine[cpu]")
    return found
