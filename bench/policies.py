"""Eviction: what each policy makes of traces, beside libcachesim and the optimum, and its cost.

    python -m bench policies [--traces FOLDER] [--share 1.0]

Hits count in the last 40 % of the requests. "gap closed" is (policy - LRU) / (OPT - LRU), by hit
ratio. Ours are prefix hits of leaf-first policies; libcachesim's are plain block hits, fed the same
accesses, the deepest block of a request first: in a cache of a few requests' size it pushes out the
head of the request that it serves. "points from libcachesim" plays ours access by access as well.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bench.runner import Row, interleave, share, spread
from kvengine.formats import read
from kvengine.policy import NO_PARENT, Policy, Run
from kvengine.policy.adaptive import Adaptive
from kvengine.policy.lru import LRU
from kvengine.policy.named import POLICIES
from kvengine.trace import Trace, optimum, simulate

TRACES = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"
BLOCK_TOKENS = 512
SCORED = 0.4
# Capacities in % of the unique blocks; the first two traces make the goal's mean.
CELLS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "mooncake_conversation": (2, 5, 10, 25),
        "agentic_code": (0.2, 0.5, 1, 2),
        "mooncake_synthetic": (2, 5, 10, 25),
        "agent_text": (2, 5, 10),
    }
)
GOAL = ("mooncake_conversation", "agentic_code")
RIVALS = ("LRU", "FIFO", "LFU", "ARC", "TwoQ", "S3FIFO", "Sieve", "WTinyLFU")
ACCESSES_MAX = 200_000  # of those played one by one
RIVAL_BLOCKS_MIN = 100  # some of them abort with less
# How oracleGeneral traces are laid out (libCacheSim): time, object, size, next access.
ORACLE = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
RESIDENT = 1_000_000
TABLE = 128


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traces", type=Path, default=TRACES, help="folder of .npz and .jsonl")
    parser.add_argument("--share", type=float, default=1.0, help="of each trace's requests")


def run(options: argparse.Namespace) -> list[Row]:
    """Make the table of hits, then the rows of cost."""
    if not options.traces.is_dir():
        raise SystemExit(f"no folder {options.traces}: name one with --traces")
    rows: list[Row] = []
    for name in CELLS:
        path = options.traces / f"{name}.npz"
        if path.exists():
            trace = trace_of(path, options.share)
            rows += [*hits(trace), *agreement(trace)]
    rows += summary(rows)
    speed = options.traces / "agentic_code.npz"
    if speed.exists():
        rows += touches(trace_of(speed, options.share), min(options.rounds, 9))
    return [*rows, *live(options.rounds)]


def trace_of(path: Path, share: float) -> Trace:
    trace = read(path)
    if trace.block_tokens < BLOCK_TOKENS:
        trace = trace.coarsened(BLOCK_TOKENS // trace.block_tokens)
    return trace.first(max(1, int(trace.requests * share)))


def hits(trace: Trace) -> list[Row]:
    """Play every policy at every capacity."""
    score_from = int(trace.requests * (1 - SCORED))
    rows = []
    for percent in CELLS[trace.name]:
        blocks = max(1, int(trace.unique * percent / 100))
        best = optimum(trace, blocks, score_from).hit_ratio
        least = simulate(trace, LRU(), blocks, score_from).hit_ratio
        found = {name: least for name in ("lru",)}
        for name, make in POLICIES.items():
            if name != "lru":
                found[name] = simulate(trace, make(), blocks, score_from).hit_ratio
        for name in RIVALS if blocks >= RIVAL_BLOCKS_MIN else ():
            found[f"libcachesim {name}"] = theirs(trace, name, blocks, score_from)
        found["opt"] = best
        for name, ratio in found.items():
            gap = (ratio - least) / (best - least) if best > least else 0.0
            case = f"{trace.name} {percent:g}% {name}"
            rows += [
                row(case, "hit_ratio", "ratio", ratio, best),
                row(case, "gap_closed", "ratio", gap, 1.0),
            ]
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Say what the goals ask of `adaptive`, over the cells that were played."""
    ratio = {row.case: row.value for row in rows if row.metric == "hit_ratio"}
    closed = [
        row.value
        for row in rows
        if row.metric == "gap_closed"
        and row.case.endswith(" adaptive")
        and row.case.split()[0] in GOAL
    ]
    below = [
        100 * (ratio[case.replace(" adaptive", " lru")] - value)
        for case, value in ratio.items()
        if case.endswith(" adaptive")
    ]
    if not closed or not below:
        return []
    return [
        row("adaptive", "gap_closed_mean", "ratio", float(np.mean(closed)), 1.0),
        row("adaptive", "worst_points_below_lru", "points", max(below)),
    ]


def agreement(trace: Trace) -> list[Row]:
    """Play lru and arc as libcachesim does: every access a request of its own, block hits."""
    flat = flattened(trace, ACCESSES_MAX)
    rows = []
    for percent in CELLS[trace.name]:
        blocks = max(1, int(trace.unique * percent / 100))
        if blocks < RIVAL_BLOCKS_MIN:
            continue
        for ours, rival in (("lru", "LRU"), ("arc", "ARC")):
            found = simulate(flat, POLICIES[ours](), blocks).hit_ratio
            apart = 100 * (found - theirs(flat, rival, blocks, 0))
            case = f"{trace.name} {percent:g}% {ours}"
            rows.append(row(case, "points_from_libcachesim", "points", abs(apart)))
    return rows


def flattened(trace: Trace, count: int) -> Trace:
    """Make a request of each of the first accesses, of one block that continues none."""
    nodes = accesses(trace)[:count]
    unknown = np.zeros(len(nodes), dtype=np.int32)
    return dataclasses.replace(
        trace,
        nodes=nodes,
        offsets=np.arange(len(nodes) + 1, dtype=np.int64),
        seconds=np.zeros(len(nodes)),
        output_tokens=unknown,
        stops=unknown,
    )


def accesses(trace: Trace) -> np.ndarray:
    """Return the blocks as they are fed to libcachesim: requests in order, the deepest first."""
    starts = np.repeat(trace.offsets[:-1] + trace.offsets[1:], np.diff(trace.offsets))
    return trace.nodes[starts - 1 - np.arange(len(trace.nodes))]


def theirs(trace: Trace, name: str, blocks: int, score_from: int) -> float:
    """Play one of libcachesim's policies. Returns block hits over accesses of the scored part."""
    import libcachesim

    with tempfile.TemporaryDirectory() as folder:
        reader = fed(trace, Path(folder))
        cache = getattr(libcachesim, name)(cache_size=blocks)
        first = int(trace.offsets[score_from])
        if first:
            cache.process_trace(reader, 0, first)
            reader.reset()
        missed, _ = cache.process_trace(reader, first, len(trace.nodes) - first)
    return 1.0 - missed


def fed(trace: Trace, folder: Path) -> object:
    import libcachesim

    table = np.zeros(len(trace.nodes), dtype=ORACLE)
    table["id"] = accesses(trace).astype(np.uint64) + 1
    table["size"] = 1
    table["next"] = 1
    table.tofile(folder / "trace.bin")
    return libcachesim.TraceReader(
        str(folder / "trace.bin"), libcachesim.TraceType.ORACLE_GENERAL_TRACE
    )


def touches(trace: Trace, rounds: int) -> list[Row]:
    """Time the same accesses, in turns: ours in one loop and verb by verb, libcachesim's in C."""
    import libcachesim

    blocks = max(1, trace.unique // 100)
    with tempfile.TemporaryDirectory() as folder:
        reader = fed(trace, Path(folder))

        def rival() -> float:
            reader.reset()
            cache = libcachesim.LRU(cache_size=blocks)
            start = time.perf_counter()
            cache.process_trace(reader)
            return time.perf_counter() - start

        def ours(make: Callable[[], Policy], verbs: bool) -> Callable[[], float]:
            told = (lambda request, entries: None) if verbs else None
            return lambda: simulate(trace, make(), blocks, evicted=told).took_s

        took = interleave(
            {
                "libcachesim": rival,
                "lru": ours(LRU, False),
                "lru verbs": ours(LRU, True),
                "adaptive": ours(Adaptive, False),
                "adaptive verbs": ours(Adaptive, True),
            },
            rounds,
            warmup=1,
        )
    rows = []
    for name in ("lru", "lru verbs", "adaptive", "adaptive verbs"):
        found = share(took["libcachesim"], took[name])
        rows.append(
            row(name, "touches_of_libcachesim_lru", "ratio", found.p50, 1.0, len(trace.nodes))
        )
    for name, seconds in took.items():
        speed = len(trace.nodes) / spread(seconds).p50 / 1e6
        rows.append(row(name, "touches", "M/s", speed))
    return rows


def live(rounds: int) -> list[Row]:
    """Time the verbs as a full store calls them: a million blocks, tables of 128, half new."""
    rows = []
    for name, make in (("lru", LRU), ("adaptive", Adaptive)):
        policy = make()
        node = Node(policy)
        seconds = [node.turn() / (1.5 * TABLE * 8) for _ in range(max(rounds, 9))]
        found = spread([each * 1e6 for each in seconds])
        rows += [
            row(f"{name} live 1M", "us_per_block", "us", found.p50, 1.0),
            row(name, "bytes_per_block", "bytes", policy.nbytes / RESIDENT),
        ]
    return rows


class Node:
    """A million resident blocks in prompts of 128, and what a store tells its policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.random = np.random.default_rng(0)
        self.prints = self.random.integers(-(2**63), 2**63 - 1, RESIDENT + TABLE, dtype=np.int64)
        self.now = 0.0
        for first in range(0, RESIDENT, TABLE):
            self.add(np.arange(first, first + TABLE, dtype=np.int32))
        self.turn()

    def add(self, ids: np.ndarray) -> None:
        self.now += 0.01
        prints = self.prints[ids]
        self.policy.touched(Run(ids[:0], NO_PARENT, 0, 0, prints), self.now)
        self.policy.added(Run(ids, NO_PARENT, 0, 4096, prints), self.now)

    def turn(self) -> float:
        """Use eight prompts and renew eight: the seconds of the policy's verbs."""
        took = 0.0
        for _ in range(8):
            first = int(self.random.integers(0, RESIDENT // TABLE)) * TABLE
            ids = np.arange(first, first + TABLE // 2, dtype=np.int32)
            run = Run(ids, NO_PARENT, 0, 0, self.prints[ids])
            self.now += 0.01
            start = time.perf_counter()
            self.policy.held(ids)
            self.policy.touched(run, self.now)
            self.policy.freed(ids)
            gone = []
            for victims in self.policy.victims(TABLE * 4096, self.now):
                self.policy.removed(victims)
                gone.append(victims)
            took += time.perf_counter() - start
            ids = np.concatenate(gone)
            self.prints[ids] = self.random.integers(-(2**63), 2**63 - 1, len(ids), dtype=np.int64)
            start = time.perf_counter()
            self.add(ids)
            took += time.perf_counter() - start
        return took


def row(
    case: str, metric: str, unit: str, value: float, bound: float | None = None, n: int = 1
) -> Row:
    return Row(
        bench="policies",
        case=case,
        metric=metric,
        unit=unit,
        value=value,
        bound=bound,
        ratio=None if not bound else value / bound,
        p20=value,
        p80=value,
        n=n,
    )
