"""Pin the arena, so that a GPU reads and writes it by itself, and count how that goes.

A cache without pinned memory works all the same: transfers stage. So what fails here is counted,
and nobody is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvengine.arena import Arena
from kvengine.kernels.driver import Cuda, Driver, DriverError
from kvengine.kernels.memory import Pinned
from kvengine.metrics import Metrics


class Pin:
    """The arena's registration with the driver of this process's GPU, made in the background."""

    def __init__(
        self, arena: Arena, metrics: Metrics, driver: Callable[[], Driver] | None = None
    ) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._nbytes = 0
        self.pinned: Pinned | None = None
        try:
            found = (driver or Cuda)()
        except (ImportError, DriverError):
            metrics.add("pin_failures")
            return
        self.pinned = Pinned(found, arena.address, arena.nbytes, self._report)

    def over(self, timeout_s: float) -> bool:
        """Wait until all is registered that will be. False if the time ran out first."""
        return self.pinned is None or self.pinned.over(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Unregister, once no transfer holds any of it. False if that took longer than the time."""
        return self.pinned is None or self.pinned.close(timeout_s)

    def detach(self) -> None:
        """After a fork, in the child: let go of what the parent has pinned."""
        if self.pinned is not None:
            self.pinned.detach()

    def _report(self, what: str, nbytes: int) -> None:
        if what == "failed":
            self._metrics.add("pin_failures")
            return
        with self._lock:
            self._nbytes += nbytes if what == "pinned" else -nbytes
            self._metrics.set("pinned_bytes", self._nbytes)
