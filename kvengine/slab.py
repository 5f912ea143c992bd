"""Memory that can be addressed: a process's own, or a memfd that several processes map.

A shared one is sealed: nobody can shrink or grow it under the others. Whoever is given a read-only
descriptor cannot map it for writing. The file's mode is 0, so that a descriptor cannot be opened
anew with more rights by another user's process.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from kvengine.errors import ConfigError

PAGE_BYTES = 4096
POPULATE_BYTES = 4 << 20
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14; Python's mmap names none of these
MADV_WIPEONFORK = 18  # Linux 4.14
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEALS = 1 | 2 | 4  # of the seals, of shrinking, of growing
Slots = NDArray[np.int32]


def shared(nbytes: int, name: str) -> int:
    """Make zeroed memory that other processes can map, of a size that stays. Returns a descriptor.

    Pages take memory only once they are used.
    """
    handle = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(handle, nbytes)
        fcntl.fcntl(handle, F_ADD_SEALS, SEALS)
        os.fchmod(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def reader(handle: int) -> int:
    """Open shared memory anew, for reading only. Returns another descriptor, the caller's."""
    os.fchmod(handle, 0o400)
    try:
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.fchmod(handle, 0)


def is_sealed(handle: int, nbytes: int) -> bool:
    """Say whether a descriptor is memory of so many bytes that nobody can shrink."""
    try:
        seals = fcntl.fcntl(handle, F_GET_SEALS)
    except OSError:
        return False
    return seals & SEALS == SEALS and os.fstat(handle).st_size == nbytes


class Slab:
    """See the module. A slot is named by its offset in pages.

    `handle`: the descriptor of shared memory, which stays the caller's; private memory if None.
    """

    def __init__(self, nbytes: int, handle: int | None = None, writable: bool = True) -> None:
        pages = nbytes // PAGE_BYTES
        if pages < 1:
            raise ConfigError(f"an arena needs at least {PAGE_BYTES} bytes, got {nbytes}")
        self.nbytes = pages * PAGE_BYTES
        if handle is None:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            advices = [getattr(mmap, "MADV_HUGEPAGE", None), MADV_WIPEONFORK]
        else:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(handle, self.nbytes, flags=mmap.MAP_SHARED, prot=access)
            advices = [getattr(mmap, "MADV_HUGEPAGE", None), getattr(mmap, "MADV_DONTFORK", None)]
        # A forked child has no use for the slab: it is not to hold copies of what changes here,
        # nor to write to what is shared.
        for advice in advices:
            try:
                if advice is not None:
                    self._map.madvise(advice)
            except OSError:
                pass  # a kernel that does not know it: the slab works all the same
        self.writable = writable
        self.memory = memoryview(self._map)
        self.address: int = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self._stopped = False

    def offsets(self, slots: Slots) -> NDArray[np.int64]:
        """Return where slots begin, in bytes from the start of the slab."""
        return slots.astype(np.int64) * PAGE_BYTES

    def addresses(self, slots: Slots) -> NDArray[np.int64]:
        """Return where slots begin, as addresses in this process."""
        return self.offsets(slots) + self.address

    def view(self, slot: int, nbytes: int) -> memoryview:
        """Return the first `nbytes` of a slot."""
        return self.memory[slot * PAGE_BYTES : slot * PAGE_BYTES + nbytes]

    def populate(self, nbytes: int | None = None) -> None:
        """Have the system back the slab with memory, so that no save waits for page faults.

        Changes no byte; takes seconds for many gigabytes, so it runs on a thread of its own, from
        the start of the slab, where slots are taken first, as far as `nbytes`. Ends early after
        `stop`.
        """
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
        advice = MADV_POPULATE_WRITE if self.writable else MADV_POPULATE_READ
        end = self.nbytes if nbytes is None else min(nbytes, self.nbytes)
        for start in range(0, end, POPULATE_BYTES):
            size = min(POPULATE_BYTES, self.nbytes - start)
            if self._stopped or advise(self.address + start, size, advice):
                return

    def punch(self, slot: int, pages: int) -> None:
        """Give pages of shared memory back to the system: whoever reads them next finds zeros."""
        self._map.madvise(mmap.MADV_REMOVE, slot * PAGE_BYTES, pages * PAGE_BYTES)

    def stop(self) -> None:
        """End `populate` soon."""
        self._stopped = True
