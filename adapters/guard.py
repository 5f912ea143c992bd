"""The outer border of an adapter: a fault of ours is counted and becomes a miss, never an error.

Several faults in a short time are a pause, in which the engine is not asked: a serving engine is
not to pay for each of its requests that something here is broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from kvengine import Client, Engine
from kvengine.errors import ClosedError

FAILURES_MAX, PAUSE_S = 3, 30.0

R = TypeVar("R")


class Guard:
    """Runs an adapter's verbs. `adapter` is its name in the metrics. Any thread may call."""

    def __init__(
        self, engine: Engine | Client, adapter: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._adapter = adapter
        self._clock = clock
        self._failures, self._away_until, self._failed_at = 0, 0.0, 0.0

    def guarded(self, verb: Callable[[], R], otherwise: Callable[[], R]) -> R:
        """Do `verb`; where it fails, or in a pause, do `otherwise`."""
        if self._clock() < self._away_until:
            return otherwise()
        try:
            return verb()
        except ClosedError:
            return otherwise()  # closed, or a forked child: nothing of the engine may be touched
        except Exception:
            self._engine.metrics.add("adapter_errors", 1, adapter=self._adapter)
            now = self._clock()
            self._failures = self._failures + 1 if now < self._failed_at + PAUSE_S else 1
            self._failed_at = now
            if self._failures >= FAILURES_MAX:
                self._failures, self._away_until = 0, now + PAUSE_S
            return otherwise()
