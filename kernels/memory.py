"""Memory of the host that devices reach, memory of devices, and what other processes map of it.

`Pinned` registers a host arena with the driver: in chunks, in the background, on a processor near
the device. Until a chunk is registered, and for ever where that fails, transfers that touch it
stage their bytes elsewhere: `covers` says which. `Slab` is memory of a device, `Shared` the same
memory in another process. Each process registers its own mapping of a shared arena. Nothing here
needs a framework; the driver is handed in.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvengine.kernels.driver import Driver, DriverError

CHUNK_BYTES = 256 << 20  # about 50 ms of the driver's time: `close` waits for one at most
PAGE_BYTES = 4096
NODES = Path("/sys/devices/system/node")

Report = Callable[[str, int], None]  # (what happened, bytes): "pinned", "unpinned" or "failed"


class Pinned:
    """Host memory, registered chunk by chunk by a thread of its own.

    address, nbytes: the mapping in this process, page-aligned, which outlives this object. report:
    is told of each chunk "pinned" and "unpinned", and once "failed" with the bytes that stay as
    they are; from any thread. All methods may be called from any thread.
    """

    def __init__(
        self,
        driver: Driver,
        address: int,
        nbytes: int,
        report: Report,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        for name, value in (("address", address), ("size", nbytes), ("chunk", chunk_bytes)):
            if value % PAGE_BYTES or value <= 0:
                raise ValueError(f"{name} {value}, expected a multiple of {PAGE_BYTES} above 0")
        self.address, self.nbytes = address, nbytes
        self.error: DriverError | None = None
        self._driver, self._report, self._step = driver, report, chunk_bytes
        self._changed = threading.Condition()
        self._end = address  # registered up to here
        self._closing = False
        self._held = 0
        self._thread = threading.Thread(target=self._register, name="kvengine-pin", daemon=True)
        self._thread.start()

    def covers(self, address: int, nbytes: int) -> bool:
        """Tell whether the device reaches these bytes now: only within `hold` does it stay so."""
        with self._changed:
            return self._reaches(address, nbytes)

    @contextlib.contextmanager
    def hold(self, address: int, nbytes: int) -> Iterator[bool]:
        """Keep bytes registered while a Transfer uses them; gives False where they are not.

        `close` waits for the end. Leave it when the device has passed the Transfer's last launch.
        """
        with self._changed:
            reaches = self._reaches(address, nbytes)
            self._held += reaches
        try:
            yield reaches
        finally:
            with self._changed:
                self._held -= reaches
                self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all is registered. False where the time ran out or registering has failed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._whole() or self.error is not None or self._closing, timeout_s
            )
            return self._whole()

    def over(self, timeout_s: float) -> bool:
        """Wait until registering has ended, all of it or not. False if the time ran out first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, timeout_s: float) -> bool:
        """Begin no more transfers, wait for those that hold bytes, and unregister.

        False where the time ran out first: the memory stays registered and must stay mapped; call
        it again.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            free = self._changed.wait_for(lambda: not self._held, max(0.0, end - time.monotonic()))
            if not free or self._thread.is_alive():
                return False
            self._unregister()
        return True

    def detach(self) -> None:
        """After a fork, in the child: the parent's registration is the parent's."""
        self._changed = threading.Condition()
        self._end, self._held, self._closing = self.address, 0, True

    def _whole(self) -> bool:
        return self._end == self.address + self.nbytes

    def _reaches(self, address: int, nbytes: int) -> bool:
        inside = self.address <= address and address + nbytes <= self._end
        return inside and not self._closing

    def _register(self) -> None:
        """Pin chunk after chunk. A refusal ends it: what is pinned stays in use."""
        self._move_near()
        while True:
            with self._changed:
                start = self._end
                size = min(self._step, self.address + self.nbytes - start)
                if self._closing or not size:
                    return
            try:
                self._driver.register(start, size)  # no lock: it takes as long as it takes
            except DriverError as error:
                with self._changed:
                    self.error = error
                    self._changed.notify_all()
                self._report("failed", self.address + self.nbytes - start)
                return
            with self._changed:
                self._end = start + size
                self._changed.notify_all()
            self._report("pinned", size)

    def _unregister(self) -> None:
        for start in range(self.address, self._end, self._step):
            with contextlib.suppress(DriverError):  # the device may be gone, the mapping is not
                self._driver.unregister(start)
            self._report("unpinned", min(self._step, self._end - start))
        self._end = self.address

    def _move_near(self) -> None:
        """Run this thread beside the device: pages that it is the first to touch are its node's."""
        try:
            node = self._driver.numa_node()
        except DriverError:
            return  # registering will say what is wrong
        found = processors(node) if node is not None else set()
        if found and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):  # a container may not allow those processors
                os.sched_setaffinity(threading.get_native_id(), found)


class Slab:
    """Memory of a device, freed with `close`. Raises DriverError where there is not so much."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a slab of {nbytes} bytes, expected at least 1")
        self.nbytes = nbytes
        self._driver = driver
        self.address = driver.allocate(nbytes)

    def handle(self) -> bytes:
        """Return what `Shared` opens in another process: 64 bytes, for processes that are trusted.

        The slab must outlive every Shared of it.
        """
        if not self.address:
            raise ValueError("the slab is closed: nothing is shared of it")
        return self._driver.export(self.address)

    def close(self) -> None:
        """Free the memory, once no Transfer uses it. A second time does nothing."""
        address, self.address = self.address, 0
        if address:
            self._driver.free(address)


class Shared:
    """A slab of another process of this host, mapped into this one.

    Raises DriverError where the driver refuses: the process that made it is gone, or is this one.
    """

    def __init__(self, driver: Driver, handle: bytes) -> None:
        self._driver = driver
        self.address = driver.open(handle)

    def close(self) -> None:
        """Unmap it, once no Transfer uses it. A second time does nothing."""
        address, self.address = self.address, 0
        if address:
            self._driver.close(address)


def slab(driver: Driver, nbytes: int, report: Report) -> Slab | None:
    """Make a Slab, or report "failed" and return None where the device has no room."""
    try:
        return Slab(driver, nbytes)
    except DriverError:
        report("failed", nbytes)
        return None


def processors(node: int, nodes: Path = NODES) -> set[int]:
    """Return the processors of a NUMA node, those that the system names; none where it does not."""
    try:
        text = (nodes / f"node{node}" / "cpulist").read_text()
    except OSError:
        return set()
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found
