"""Play a trace against an engine or a daemon, with saves and loads of blocks that are made up.

Each request is matched, what is worth loading is loaded, the rest is "computed" (told to the
engine as a model's cost, not waited for) and saved, as a serving engine would; at the trace's own
times, so many times faster, or as fast as it goes. A block begins with its own number, so that a
wrong one is seen. Nothing of earlier replays is hit: the names are drawn anew.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvengine.cache import PagedCache
from kvengine.costs import CALL_S, Model
from kvengine.engine import Engine
from kvengine.errors import TraceError
from kvengine.keys import KEY_BYTES, BlockKeys, Namespace
from kvengine.layout import Layout
from kvengine.peer.client import Client
from kvengine.policy import Request
from kvengine.trace import Trace

TABLE_BLOCKS = 256  # moved at a time; each client has a cache of so many
WAIT_S = 120.0
STAMP_BYTES = 8
OPS = ("match", "load", "save")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one verb. Of load and save: a request's, until all of it had moved."""

    count: int
    p50: float
    p90: float
    p99: float
    most: float


@dataclass
class Played:
    """What became of a replay. `wrong_blocks` were called good and hold another block: a bug.

    `late_s`: how far behind the trace's times the last request began, at most.
    """

    requests: int = 0
    lookup_blocks: int = 0
    hit_blocks: int = 0
    loaded_blocks: int = 0
    failed_blocks: int = 0
    wrong_blocks: int = 0
    saved_blocks: int = 0
    prefill_s: float = 0.0
    saved_prefill_s: float = 0.0
    moved_bytes: int = 0
    took_s: float = 0.0
    late_s: float = 0.0
    latency: dict[str, Latency] = field(default_factory=dict)

    @property
    def hit_ratio(self) -> float:
        """Return blocks found over blocks asked for."""
        return self.hit_blocks / self.lookup_blocks if self.lookup_blocks else 0.0


def replay(
    engine: Engine | Client,
    trace: Trace,
    model: Model,
    *,
    block_bytes: int = 1 << 16,
    speed: float = 0.0,
    clients: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Played:
    """Play a trace; see the module. speed: times the trace's own, 0 as fast as it goes.

    block_bytes: of each block, whatever the model; clients: requests that are under way at a time.
    Raises TraceError for what cannot be.
    """
    if not STAMP_BYTES <= block_bytes <= 1 << 30:
        raise TraceError(f"block_bytes: given {block_bytes}, expected {STAMP_BYTES} to {1 << 30}")
    if not 0 <= speed < 1e9:
        raise TraceError(f"speed: given {speed}, expected 1 for the trace's own, 0 for no waiting")
    if not 1 <= clients <= 256:
        raise TraceError(f"clients: given {clients}, expected 1 to 256")
    replayed = _Replay(engine, trace, model, block_bytes, speed, progress)
    start = time.perf_counter()
    with ThreadPoolExecutor(clients, "kvengine-replay") as pool:
        try:
            running = [pool.submit(_Client(replayed).run) for _ in range(clients)]
            for each in running:
                each.result()
        finally:
            replayed.stop.set()
    return replayed.over(time.perf_counter() - start)


class _Replay:
    """What the clients share: which request is next, and the sums."""

    def __init__(
        self,
        engine: Engine | Client,
        trace: Trace,
        model: Model,
        block_bytes: int,
        speed: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.engine = engine
        self.trace = trace
        self.model = model
        self.stop = threading.Event()
        self.layout = Layout.opaque(
            layers=1,
            page_bytes=block_bytes,
            block_tokens=trace.block_tokens,
            permutation="trace",
        )
        self.names = engine.namespace(model=f"trace {model.name}", layout=self.layout)
        drawn = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
        self.words = drawn.integers(0, 256, (trace.unique, KEY_BYTES), dtype=np.uint8)
        self._speed = speed
        self._progress = progress
        self._lock = threading.Lock()
        self._next = 0
        self._start = time.perf_counter()
        self._played = Played()
        self._seconds: dict[str, list[float]] = {op: [] for op in OPS}

    def take(self) -> int:
        """Return the next request, -1 where there is none; wait for its time."""
        with self._lock:
            request, self._next = self._next, self._next + 1
        if request >= self.trace.requests or self.stop.is_set():
            return -1
        if self._speed:
            since = float(self.trace.seconds[request] - self.trace.seconds[0]) / self._speed
            late = time.perf_counter() - self._start - since
            if late < 0 and self.stop.wait(-late):
                return -1
            with self._lock:
                self._played.late_s = max(self._played.late_s, late)
        return request

    def add(self, sums: dict[str, float], seconds: dict[str, float]) -> None:
        """Take in what became of one request."""
        with self._lock:
            self._played.requests += 1
            for name, value in sums.items():
                setattr(self._played, name, getattr(self._played, name) + value)
            for op, took in seconds.items():
                self._seconds[op].append(took)
            done = self._played.requests
        if self._progress is not None:
            self._progress(done)

    def over(self, took_s: float) -> Played:
        """Return the sums, after the last client has ended."""
        self._played.took_s = took_s
        for op, seconds in self._seconds.items():
            if seconds:
                at = 1e3 * np.percentile(seconds, (50, 90, 99, 100))
                self._played.latency[op] = Latency(len(seconds), *map(float, at))
        return self._played


class _Client:
    """One at a time, request after request, in a cache of its own."""

    def __init__(self, shared: _Replay) -> None:
        self._shared = shared
        self._engine = shared.engine
        self._names: Namespace = shared.names
        size = shared.layout.head_dim
        self._pages = np.zeros((TABLE_BLOCKS, size), dtype=np.uint8)
        self._cache: PagedCache = self._engine.cache(self._names, [self._pages])

    def run(self) -> None:
        """Play requests until there are no more."""
        while (request := self._shared.take()) >= 0:
            self._play(request)

    def _play(self, request: int) -> None:
        trace, model, tokens = (
            self._shared.trace,
            self._shared.model,
            self._shared.trace.block_tokens,
        )
        path = trace.path(request)
        keys = self._names.keys_of(self._shared.words[path].tobytes())
        about = Request(int(trace.output_tokens[request]), int(trace.stops[request]), tokens)
        start = time.perf_counter()
        seconds: dict[str, float] = {}
        with self._engine.match(keys, request=about) as lease:
            seconds["match"] = time.perf_counter() - start
            loaded, failed, wrong = 0, 0, 0
            for first in range(lease.worth.start, lease.worth.stop, TABLE_BLOCKS):
                table = np.arange(min(TABLE_BLOCKS, lease.worth.stop - first))
                self._pages[:, :STAMP_BYTES] = 0
                transfer = self._engine.load(lease, self._cache, table, first=first)
                transfer.wait(WAIT_S)
                good = int(transfer.good.argmin()) if not transfer.good.all() else len(table)
                here = self._stamps(path[first : first + good])
                wrong += int((self._pages[:good, :STAMP_BYTES] != here).any(axis=1).sum())
                loaded += good
                if good < len(table):
                    failed = len(table) - good
                    break
            held = lease.blocks
        if loaded or failed:
            seconds["load"] = time.perf_counter() - start - seconds["match"]
        if loaded < len(path):
            spent = model.seconds(loaded * tokens, len(path) * tokens) + CALL_S
            missing = (len(path) - loaded) * tokens
            self._engine.observe_prefill(self._names, loaded * tokens, missing, spent)
        saved = self._save(keys, path, loaded if failed else max(loaded, held), seconds)
        self._shared.add(
            {
                "lookup_blocks": len(path),
                "hit_blocks": held,
                "loaded_blocks": loaded,
                "failed_blocks": failed,
                "wrong_blocks": wrong,
                "saved_blocks": saved,
                "prefill_s": model.seconds(0, len(path) * tokens),
                "saved_prefill_s": model.seconds(0, loaded * tokens) - seconds.get("load", 0.0),
                "moved_bytes": (loaded + saved) * self._pages.shape[1],
            },
            seconds,
        )

    def _save(
        self, keys: BlockKeys, path: NDArray[np.int32], first: int, seconds: dict[str, float]
    ) -> int:
        saved, start = 0, time.perf_counter()
        for at in range(first, len(path), TABLE_BLOCKS):
            part = path[at : at + TABLE_BLOCKS]
            self._pages[: len(part), :STAMP_BYTES] = self._stamps(part)
            transfer = self._engine.save(
                keys[at : at + TABLE_BLOCKS], self._cache, np.arange(len(part))
            )
            transfer.wait(WAIT_S)
            saved += int(transfer.good.sum())
        if first < len(path):
            seconds["save"] = time.perf_counter() - start
        return saved

    def _stamps(self, path: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Return what blocks begin with: never zeros."""
        numbers = path.astype("<i8") + 1
        return numbers.view(np.uint8).reshape(-1, STAMP_BYTES)
