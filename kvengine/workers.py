"""A few threads that run queued work: transfers have some, each tier has its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Work = Callable[[], None]


class Workers:
    """Run work in the order it was given, on `count` daemon threads.

    Work reports its own result; an exception that escapes it goes to `on_error` and the thread
    lives on. Callers bound what they submit.
    """

    def __init__(self, count: int, name: str, on_error: Callable[[Exception], None]) -> None:
        # Not a SimpleQueue: a burst of puts wakes only one of the threads that wait on that.
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._on_error = on_error
        self._lock = threading.Lock()  # nothing is queued behind what ends the threads
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def count(self) -> int:
        """Number of threads."""
        return len(self._threads)

    def submit(self, work: Work) -> bool:
        """Queue work. False once closed: the work will not run."""
        with self._lock:
            if self._closed:
                return False
            self._queue.put(work)
            return True

    def close(self, timeout_s: float) -> bool:
        """Run what is queued, then end the threads. False if that took longer than the time."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # the thread outlives any one piece of work
                self._on_error(error)
            del work
