"""The disk tier against the bare device: O_DIRECT, the same bytes, the same number of threads."""

import argparse
import gc
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import kvengine
from bench import runner
from bench.runner import ROUNDS_MIN, Row, Spread, interleave, share, spread
from bench.tiers import sealer
from kvengine import frame
from kvengine.arena import Arena
from kvengine.layout import Layout
from kvengine.metrics import Metrics
from kvengine.policy.lru import LRU
from kvengine.seal import Sealer
from kvengine.store import Store
from kvengine.tiers import Span
from kvengine.tiers.disk import DiskTier
from kvengine.tiers.files import OSFiles
from kvengine.tiers.format import Geometry
from kvengine.tiers.segments import Segments

row = partial(runner.row, "store")

MIB = 1 << 20
PAGE = 4096
THREADS = 2
TABLE = 16
TABLES = 6  # a round writes or reads so many tables
READS_MIN = 2000
DEADLINE_S = 600.0
SLOTS = 1_000_000
PROMPT = 48
LAYOUT = Layout(
    layers=32, kv_heads=8, head_dim=128, head_dim_v=128, dtype="float16", block_tokens=16
)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure transfers, opening a large directory, and a scan that memory does not hold."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        return [
            *transfers(Path(folder), options.rounds),
            *sealed(Path(folder), options.rounds),
            *recovery(Path(folder) / "large"),
            *cyclic_scan(Path(folder) / "scan"),
            *first_layer(Path(folder) / "layers", options.rounds),
        ]


class Frames:
    """So many frames of 2 MiB of random bytes, in page-aligned memory, and as many blank ones."""

    def __init__(self, count: int) -> None:
        self.frame_bytes = frame.frame_bytes(LAYOUT)
        self.room = -(-self.frame_bytes // PAGE) * PAGE
        self.source = mmap.mmap(-1, count * self.room)
        self.target = mmap.mmap(-1, count * self.room)
        self.template = frame.Template(LAYOUT, bytes(32))
        self.digests = np.zeros((count, LAYOUT.layers, 2), dtype=np.uint64)
        self.count = count
        self.target[:] = bytes(len(self.target))
        draw = np.random.default_rng(0)
        for index in range(count):
            view = self.view(self.source, index)
            payload = draw.integers(0, 256, LAYOUT.payload_bytes, dtype=np.uint8)
            view[self.template.header_bytes : self.frame_bytes] = payload.data
            parts = [(int(at), int(size)) for at, size in self.template.segments.tolist()]
            self.digests[index] = frame.digests_of(memoryview(payload.data), parts)

    def view(self, memory: mmap.mmap, index: int) -> memoryview:
        return memoryview(memory)[index * self.room : (index + 1) * self.room]

    def name(self) -> list[bytes]:
        """Give every source frame a new key."""
        keys = [os.urandom(32) for _ in range(self.count)]
        zeros = [bytes(32)] * self.count
        headers = self.template.write(keys, zeros, bytes(16), range(self.count), self.digests)
        for index, header in enumerate(headers):
            self.view(self.source, index)[: len(header)] = header
        return keys

    def spans(self, memory: mmap.mmap, keys: Sequence[bytes], order: Sequence[int]) -> list[Span]:
        return [Span(keys[i], self.view(memory, i), self.frame_bytes) for i in order]


class Raw:
    """A preallocated file, written and read with O_DIRECT by a pool of threads."""

    def __init__(self, path: Path, frames: Frames) -> None:
        self.path, self.frames = path, frames
        self.pool = ThreadPoolExecutor(THREADS)
        self.handle = -1

    def fresh(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.path.unlink()
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        self.handle = os.open(self.path, flags, 0o600)
        os.posix_fallocate(self.handle, 0, self.frames.count * self.frames.room)

    def write(self) -> float:
        """Write all frames, with a sync after each table."""
        self.fresh()
        frames, start = self.frames, time.perf_counter()

        def put(index: int) -> None:
            view = frames.view(frames.source, index)
            assert os.pwritev(self.handle, [view], index * frames.room) == frames.room

        for at in range(0, frames.count, TABLE):
            list(self.pool.map(put, range(at, at + TABLE)))
            os.fdatasync(self.handle)
        return time.perf_counter() - start

    def read(self, order: Sequence[int]) -> float:
        frames, start = self.frames, time.perf_counter()

        def get(index: int) -> None:
            view = frames.view(frames.target, index)
            assert os.preadv(self.handle, [view], index * frames.room) == frames.room

        list(self.pool.map(get, order))
        return time.perf_counter() - start

    def close(self) -> None:
        self.pool.shutdown()
        os.close(self.handle)


class Ours:
    """The tier in its durable mode, as the engine opens it."""

    def __init__(self, path: Path, frames: Frames, seal: Sealer | None = None) -> None:
        self.path, self.frames, self.seal = path, frames, seal
        self.tier: DiskTier | None = None
        self.keys: list[bytes] = []
        self.good = True

    def fresh(self) -> DiskTier:
        if self.tier is not None:
            self.tier.close()
            shutil.rmtree(self.path)
        self.keys = self.frames.name()
        size = 4 * self.frames.count * self.frames.room
        self.tier = DiskTier(
            self.path,
            size,
            Metrics(),
            lambda keys: None,
            threads=THREADS,
            durable=True,
            seal=self.seal,
        )
        return self.tier

    def write(self) -> float:
        """Write all frames, a table at a time, each counted only once it has been synced."""
        tier, frames = self.fresh(), self.frames
        start = time.perf_counter()
        for at in range(0, frames.count, TABLE):
            spans = frames.spans(frames.source, self.keys, range(at, at + TABLE))
            self.move(tier.write, spans)
        return time.perf_counter() - start

    def read(self, order: Sequence[int]) -> float:
        assert self.tier is not None
        start = time.perf_counter()
        self.move(self.tier.read, self.frames.spans(self.frames.target, self.keys, order))
        return time.perf_counter() - start

    def move(self, verb: Callable[..., None], spans: list[Span]) -> None:
        left, over, lock = [len(spans)], threading.Event(), threading.Lock()

        def report(index: int, good: bool) -> None:
            with lock:
                self.good &= good
                left[0] -= 1
                if not left[0]:
                    over.set()

        verb(spans, time.monotonic() + DEADLINE_S, report)
        over.wait()

    def latencies(self, count: int) -> list[float]:
        """Read frames one by one, by as many clients as the tier has threads."""
        found: list[float] = []

        def client(seed: int) -> None:
            draw = random.Random(seed)
            half = self.frames.count // THREADS
            for _ in range(count // THREADS):
                start = time.perf_counter()
                self.read([seed * half + draw.randrange(half)])
                found.append(time.perf_counter() - start)

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(THREADS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        return found

    def close(self) -> None:
        assert self.tier is not None
        self.tier.close()


def transfers(folder: Path, rounds: int) -> list[Row]:
    """Write and read the same frames, raw and ours in turns."""
    frames = Frames(TABLE * TABLES)
    raw, ours = Raw(folder / "raw", frames), Ours(folder / "ours", frames)
    cpu: dict[str, list[float]] = {name: [] for name in ("write raw", "write", "read raw", "read")}
    order = list(range(frames.count))
    draw = random.Random(0)

    def timed(name: str, work: Callable[[], float]) -> Callable[[], float]:
        def turn() -> float:
            draw.shuffle(order)
            before = time.process_time()
            took = work()
            cpu[name].append((time.process_time() - before) / (frames.count * 2 * MIB / 1e9))
            return took

        return turn

    turns = {
        "write raw": timed("write raw", raw.write),
        "write": timed("write", ours.write),
    }
    took = interleave(turns, rounds, warmup=1)
    took |= interleave(
        {
            "read raw": timed("read raw", lambda: raw.read(order)),
            "read": timed("read", lambda: ours.read(order)),
        },
        rounds,
        warmup=1,
    )
    frames.target[:] = bytes(len(frames.target))
    ours.read(order)
    matches = ours.good and frames.target[:] == frames.source[:]
    latencies = ours.latencies(READS_MIN)
    ours.close()
    raw.close()
    rows = []
    for verb, case in (("write", "disk durable write 2MiB"), ("read", "disk cold read 2MiB")):
        bare, mine = took[f"{verb} raw"], took[verb]
        nbytes = frames.count * frames.frame_bytes
        speed = spread([nbytes / seconds / 1e9 for seconds in mine])
        bound = nbytes / spread(bare).p50 / 1e9
        rows += [
            row(case, "share_of_raw", "ratio", share(bare, mine), 1.0, matches),
            row(case, "speed", "GB/s", speed, bound, matches),
            row(case, "cpu", "s/GB", spread(cpu[verb]), spread(cpu[f"{verb} raw"]).p50),
        ]
    ordered = sorted(latencies)
    for share_of, name in ((0.5, "p50_ms"), (0.99, "p99_ms")):
        value = ordered[int(share_of * (len(ordered) - 1))] * 1e3
        found = Spread(value, value, value, len(ordered))
        rows.append(row("disk cold read 2MiB", name, "ms", found, matches=ours.good))
    return rows


def sealed(folder: Path, rounds: int) -> list[Row]:
    """Write and read the same frames in turns, plain and encrypted."""
    frames = Frames(TABLE * TABLES)
    both = {
        "plain": Ours(folder / "plain", frames),
        "sealed": Ours(folder / "sealed", frames, sealer()),
    }
    order = list(range(frames.count))
    random.Random(0).shuffle(order)
    took = {
        "durable write": interleave({n: each.write for n, each in both.items()}, rounds, warmup=1),
        "cold read": interleave(
            {name: partial(each.read, order) for name, each in both.items()}, rounds, warmup=1
        ),
    }
    frames.target[:] = bytes(len(frames.target))
    both["sealed"].read(order)
    matches = all(each.good for each in both.values()) and all(
        frames.view(frames.target, at)[PAGE : frames.frame_bytes]
        == frames.view(frames.source, at)[PAGE : frames.frame_bytes]
        for at in order
    )
    for each in both.values():
        each.close()
    return [
        row(
            f"disk {verb} 2MiB sealed",
            "share_of_plain",
            "ratio",
            share(found["plain"], found["sealed"]),
            1.0,
            matches,
        )
        for verb, found in took.items()
    ]


class Sparse(OSFiles):
    """Files with holes for slots: a large directory costs what its headers and footers take."""

    def allocate(self, handle: int, nbytes: int) -> None:
        os.ftruncate(handle, nbytes)

    def sync(self, handle: int) -> None:
        pass


def recovery(folder: Path) -> list[Row]:
    """Open a directory with a million slots: footers, the tier's books, the store's index."""
    stride = PAGE + -(-frame.frame_bytes(LAYOUT) // PAGE) * PAGE
    geometry = Geometry.fitting(stride, 1 << 30)
    segments = Segments(Sparse(), folder, lambda what: None)
    segments.own()
    left, number = SLOTS, 0
    while left:
        number += 1
        made = segments.create(number, number, geometry, durable=False)
        assert made.table is not None
        made.used = min(left, geometry.slots)
        table = made.table[: made.used]
        table["key"] = np.frombuffer(os.urandom(32 * made.used), np.uint8).reshape(-1, 32)
        table["frame_bytes"] = frame.frame_bytes(LAYOUT)
        table["sequence"] = 1
        segments.seal(made)
        left -= made.used
    segments.close()
    os.sync()
    took, counts = [], []
    for _ in range(ROUNDS_MIN):
        gc.collect()
        store = Store(Arena(1 << 22), LRU(), Metrics(), time.monotonic)
        start = time.perf_counter()
        tier = DiskTier(folder, 1 << 42, Metrics(), lambda keys: None)
        counts.append(store.attach(tier))
        took.append(time.perf_counter() - start)
        tier.close()
    shutil.rmtree(folder)
    matches = set(counts) == {SLOTS}
    found = spread(took)
    return [
        row("disk recover 1M slots", "s", "s", found, matches=matches),
        row("disk recover 1M slots", "slots", "slots", Spread(SLOTS, SLOTS, SLOTS, 1)),
        row("disk recover 1M slots", "segments", "files", Spread(number, number, number, 1)),
    ]


def cyclic_scan(folder: Path) -> list[Row]:
    """Ask again and again for twice what memory holds, saving what is missed."""
    layout = Layout(
        layers=4, kv_heads=2, head_dim=64, head_dim_v=64, dtype="float16", block_tokens=16
    )
    memory, cycles, prompts, blocks = 16 * MIB, 4, 32, 16
    nbytes = frame.frame_bytes(layout)
    blocks = 2 * memory // nbytes // prompts
    draw = np.random.default_rng(0)
    shape = (blocks, 16, 2, 64)
    sources = [
        [
            tuple(draw.integers(0, 1 << 15, shape, np.int16).view(np.float16) for _ in "kv")
            for _ in range(4)
        ]
        for _ in range(prompts)
    ]
    table, good, unique = np.arange(blocks), True, prompts * blocks
    with kvengine.open(f"mem://?size={memory} | file://{folder}?size=1G") as engine:
        names = engine.namespace(model="bench", layout=layout)
        keys = [names.keys(draw.integers(0, 32000, blocks * 16)) for _ in range(prompts)]
        for cycle in range(cycles):
            for each, source in zip(keys, sources, strict=True):
                target = [tuple(np.zeros_like(a) for a in pair) for pair in source]
                with engine.match(each) as lease:
                    transfer = engine.load(lease, target, table[: lease.blocks])
                transfer.wait()
                if cycle:
                    good &= transfer.blocks == blocks and all(
                        np.array_equal(a.view(np.int16), b.view(np.int16))
                        for pair, twin in zip(source, target, strict=True)
                        for a, b in zip(pair, twin, strict=True)
                    )
                engine.save(each, source, table).wait()
                engine.flush()
        demoted = engine.stats()["demoted_blocks"]
        fetched = engine.stats()["fetched_blocks"]
    twice = float((demoted - unique) * nbytes)
    case = "cyclic scan 2x memory"
    return [
        row(case, "bytes_written_twice", "bytes", Spread(twice, twice, twice, 1), matches=good),
        row(case, "blocks_written", "blocks", Spread(demoted, demoted, demoted, 1)),
        row(case, "blocks_fetched", "blocks", Spread(fetched, fetched, fetched, 1)),
    ]


def first_layer(folder: Path, rounds: int) -> list[Row]:
    """Load a prompt from disk: when is its first layer there, and when all of it?"""
    draw, shape = np.random.default_rng(0), (PROMPT, 16, 8, 128)
    source = [
        tuple(draw.integers(0, 1 << 15, shape, np.int16).view(np.float16) for _ in "kv")
        for _ in range(LAYOUT.layers)
    ]
    target = [tuple(np.zeros_like(each) for each in pair) for pair in source]
    first: list[float] = []
    with kvengine.open(f"mem://?size=512M | file://{folder}?size=2G") as engine:
        keys = engine.namespace(model="bench", layout=LAYOUT).keys(np.arange(PROMPT * 16))
        engine.save(keys, source, np.arange(PROMPT)).wait()
        engine.flush()
        engine.warm()
        good = True

        def load() -> float:
            nonlocal good
            engine.squeeze(0)
            start = time.perf_counter()
            with engine.match(keys) as lease:
                transfer = engine.load(lease, target, np.arange(lease.blocks))
            transfer.wait_layer(0)
            first.append(time.perf_counter() - start)
            transfer.wait()
            good &= transfer.blocks == PROMPT
            return time.perf_counter() - start

        took = interleave({"load": load}, rounds, warmup=1)["load"]
    good &= all(
        np.array_equal(a.view(np.int16), b.view(np.int16))
        for pair, twin in zip(source, target, strict=True)
        for a, b in zip(pair, twin, strict=True)
    )
    case = f"disk load 2MiB x{PROMPT}"
    shares = spread([early / whole for early, whole in zip(first[-len(took) :], took, strict=True)])
    return [
        row(case, "ms", "ms", spread([seconds * 1e3 for seconds in took]), matches=good),
        row(case, "first_layer_at", "ratio", shares, 1.0, good),
    ]
