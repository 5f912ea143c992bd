"""Saving, loading and the books: ours against memcpy, and against a bare loop of blake3.

The cache is laid out as Llama-3.1-8B's (32 layers, K and V apart, 8 heads of 128, bf16), so a block
of 16 tokens has 2 MiB in 64 runs of 32 KiB. Digests are computed on save and verified on load, as
the engine does it by default. Caches, arena and memcpy buffers are larger than the processor's
caches, and each round moves bytes that the round before did not touch. Control is measured with a
million blocks resident, random keys, and an eviction for every block reserved.
"""

import argparse
import gc
import mmap
import os
import time
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
from blake3 import blake3

import kvengine
from bench import runner, tiers
from bench.runner import Row, Spread, interleave, share, spread, times
from kvengine.arena import Arena
from kvengine.engine import Engine
from kvengine.keys import ROOT_KEY, Namespace
from kvengine.metrics import Metrics
from kvengine.policy import NO_PARENT, Run
from kvengine.policy.lru import LRU
from kvengine.policy.retention import Retained
from kvengine.shadow import Shadows
from kvengine.store import Store

row = partial(runner.row, "store")

MIB = 1 << 20
TABLE_BYTES = 32 * MIB
FOOTPRINT_BYTES = 512 * MIB
LAYERS, HEADS, DIM = 32, 8, 128
DRAWN = 1 << 22  # values that fill a cache, over and over
RESIDENT = 1_000_000
TABLES = 16
SHADOWS = ("arc", "s3fifo", "windowed-lru", "adaptive")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--tier` to the command line."""
    parser.add_argument(
        "--tier",
        type=tiers.chosen,
        metavar="NAMES",
        help=f"measure these tiers instead of memory, as in {','.join(tiers.NAMES)}",
    )


def run(options: argparse.Namespace) -> list[Row]:
    """Measure transfers, control and keys; or the tiers that are named."""
    if options.tier:
        return tiers.run(options)
    rounds = options.rounds
    return [*transfers(rounds), *control(rounds), *retention(rounds), *keys(rounds)]


def transfers(rounds: int) -> list[Row]:
    """Move 32 MiB a round: 16 blocks of 2 MiB, and one of 32 MiB, with two threads and with one.

    Shares are of the cache's own bytes, also where blocks are coded on the way (bf16: by default).
    """
    source = np.random.default_rng(0).integers(0, 255, FOOTPRINT_BYTES, dtype=np.uint8)
    target = np.ones(FOOTPRINT_BYTES, dtype=np.uint8)
    rows = []
    for label, tokens, threads, dtype in (
        ("2MiB x16", 16, 2, "float16"),
        ("2MiB x16 one thread", 16, 1, "float16"),
        ("32MiB", 256, 2, "float16"),
        ("2MiB x16 lossless", 16, 2, "bfloat16"),
    ):
        mover = Mover(tokens, threads, dtype)
        turns = mover.turns(source, target)
        took = interleave(turns, rounds, warmup=TABLES + 2)
        for verb in ("save", "load"):
            found = share(took["memcpy"], took[verb])
            speed = TABLE_BYTES / spread(took["memcpy"]).p50 / 1e9
            rows.append(
                row(
                    f"{verb} {label}",
                    "share_of_memcpy",
                    "ratio",
                    found,
                    bound=1.0,
                    matches=mover.matches,
                )
            )
            ours = spread([TABLE_BYTES / s / 1e9 for s in took[verb]])
            rows.append(row(f"{verb} {label}", "speed", "GB/s", ours, speed, mover.matches))
        mover.engine.close()
    return rows


class Mover:
    """An engine and a paged cache: the first half of its blocks is saved, the second loaded."""

    def __init__(self, tokens: int, threads: int, dtype: str) -> None:
        self.layout = kvengine.Layout(
            layers=LAYERS,
            kv_heads=HEADS,
            head_dim=DIM,
            head_dim_v=DIM,
            dtype=dtype,
            block_tokens=tokens,
        )
        self.engine: Engine = kvengine.open("mem://?size=768M", threads=threads)
        self.names = self.engine.namespace(model="bench", layout=self.layout)
        self.count = TABLE_BYTES // self.layout.payload_bytes
        self.blocks = FOOTPRINT_BYTES // self.layout.payload_bytes
        random = np.random.default_rng(1)
        # One slab for all layers, aligned, as serving engines allocate it.
        shape = (LAYERS, 2, self.blocks, tokens, HEADS, DIM)
        memory = mmap.mmap(-1, FOOTPRINT_BYTES)
        memory.madvise(mmap.MADV_HUGEPAGE)
        slab = np.frombuffer(memory, dtype=np.uint16)
        # Exponents as real K/V has them, or the coder would have nothing to do.
        drawn = random.standard_normal(DRAWN, np.float32).view(np.uint32) >> 16
        slab.reshape(-1, DRAWN)[:] = drawn.astype(np.uint16)
        kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
        slab = slab.view(kind).reshape(shape)
        self.arrays = [(slab[layer, 0], slab[layer, 1]) for layer in range(LAYERS)]
        self.cache = self.engine.cache(self.names, self.arrays)
        self.engine.warm()
        self.random = random
        self.turn = self.copied = 0
        self.matches = True
        self.keys = self.names.keys([])
        self.saved = np.empty(0, dtype=np.int64)

    def turns(
        self, source: np.ndarray, target: np.ndarray
    ) -> dict[str, Callable[[], float | None]]:
        """Return what one round does: memcpy, save, load; each gives its own seconds."""

        def memcpy() -> float:
            at = (self.copied % TABLES) * TABLE_BYTES
            self.copied += 1
            start = time.perf_counter()
            np.copyto(target[at : at + TABLE_BYTES], source[at : at + TABLE_BYTES])
            return time.perf_counter() - start

        return {"memcpy": memcpy, "save": self.save, "load": self.load}

    def save(self) -> float:
        """Save blocks that the engine does not hold."""
        self.turn += 1
        tokens = np.arange(self.count * self.layout.block_tokens) + self.turn * 1_000_000
        keys = self.names.keys(tokens)
        table = self.random.permutation(self.blocks // 2)[: self.count]
        start = time.perf_counter()
        transfer = self.engine.save(keys, self.cache, table)
        transfer.wait()
        took = time.perf_counter() - start
        self.matches &= bool(transfer.good.all())
        self.keys, self.saved = keys, table
        return took

    def load(self) -> float:
        """Load what was last saved into other blocks, and compare."""
        if not len(self.keys):
            self.save()
        half = self.blocks // 2
        table = half + self.random.permutation(half)[: self.count]
        start = time.perf_counter()
        with self.engine.match(self.keys) as lease:
            transfer = self.engine.load(lease, self.cache, table)
        transfer.wait()
        took = time.perf_counter() - start
        self.matches &= transfer.blocks == self.count and all(
            np.array_equal(each[table].view(np.uint16), each[self.saved].view(np.uint16))
            for pair in self.arrays[:: LAYERS - 1]
            for each in pair
        )
        return took


def control(rounds: int) -> list[Row]:
    """Measure index work alone, with a million blocks resident and the arena full."""
    layout = kvengine.Layout(
        layers=1, kv_heads=1, head_dim=16, head_dim_v=0, dtype="uint8", block_tokens=16
    )
    arena = Arena(RESIDENT * 2 * 4096)  # two pages a block; no byte of it is touched
    store = Store(arena, LRU(), Metrics(), time.monotonic)
    with kvengine.open("mem://?size=1M") as engine:
        names = engine.namespace(model="bench", layout=layout)
    names = store.namespace(names.identity, layout, bytes(32))
    gc.collect()
    gc.freeze()  # what the imports have made is not ours to count
    table = np.frombuffer(os.urandom(32 * RESIDENT), dtype=np.uint8).reshape(-1, 32)
    shadows = Shadows(SHADOWS, 2 * RESIDENT, Metrics())
    for at in range(0, RESIDENT, 4096):
        filled = names.keys_of(table[at : at + 4096].tobytes())
        store.commit(store.reserve(filled))
        shadows.saved(filled, 2, 0.0)
    resident = store.stats()["blocks"]
    # The first tenth is what eviction takes while this runs.
    recent = table[RESIDENT // 10 :]
    random = np.random.default_rng(2)
    missed = [0]

    def match(count: int, tables: int) -> Callable[[], float]:
        def measure() -> float:
            made = [
                names.keys_of(recent[random.integers(0, len(recent), count)].tobytes())
                for _ in range(tables)
            ]
            start = time.perf_counter()
            for keys in made:
                lease = store.match(keys)
                lease.release()
            took = time.perf_counter() - start
            missed[0] += count - lease.blocks
            return took / (count * tables)

        return measure

    def shadow() -> float:
        made = [
            names.keys_of(recent[random.integers(0, len(recent), 128)].tobytes())
            for _ in range(TABLES)
        ]
        start = time.perf_counter()
        for keys in made:
            shadows.asked(keys, 128, 128, 2, None, lambda blocks: None, 1.0)
        return (time.perf_counter() - start) / (128 * TABLES)

    def reserve() -> float:
        made = [names.keys_of(os.urandom(32 * 128)) for _ in range(TABLES)]
        start = time.perf_counter()
        for keys in made:
            missed[0] += 128 - store.commit(store.reserve(keys))
        return (time.perf_counter() - start) / (128 * TABLES)

    took = interleave(
        {
            "match": match(128, TABLES),
            "shadow": shadow,
            "reserve": reserve,
            "match8192": match(8192, 1),
        },
        rounds,
    )
    pauses = []
    for _ in range(max(9, rounds)):
        start = time.perf_counter()
        gc.collect()
        pauses.append(time.perf_counter() - start)
    gc.unfreeze()
    store.check()
    matches = not missed[0] and resident == RESIDENT
    nbytes = store.stats()["index_bytes"] / RESIDENT
    return [
        row("match+release 1M", "us_per_block", "us", micro(took["match"]), matches=matches),
        row("reserve+commit 1M", "us_per_block", "us", micro(took["reserve"]), matches=matches),
        row(
            "match+release 1M x8192",
            "us_per_block",
            "us",
            micro(took["match8192"]),
            matches=matches,
        ),
        row(
            f"{len(SHADOWS)} shadows of a match 1M",
            "us_per_block",
            "us",
            micro(took["shadow"]),
            bound=spread(took["match"]).p50 * 1e6,
        ),
        row("index+lru 1M", "bytes_per_block", "bytes", Spread(nbytes, nbytes, nbytes, 1)),
        row("gc pause 1M", "ms", "ms", spread([seconds * 1e3 for seconds in pauses])),
    ]


def retention(rounds: int) -> list[Row]:
    """Measure what callers ask for (levels, lives), with a million blocks that have both."""
    policy, count = Retained(LRU()), 128
    ones = np.ones(count, dtype=np.int32)
    ids = np.random.default_rng(4).permutation(RESIDENT).astype(np.int32)
    now = [0.0]

    def put(entries: np.ndarray) -> None:
        now[0] += 0.01
        level = (40, 50, 60)[int(entries[0]) % 3]
        policy.added(Run(entries, NO_PARENT, 0, 4096), now[0])
        asked = ones[: len(entries)]
        policy.keep(entries, asked, level, now[0] + 1e6, now[0] + 1e5, now[0])

    for at in range(0, RESIDENT, count):
        put(ids[at : at + count])

    def match() -> float:
        at = int(now[0] * 1e4) % (RESIDENT - TABLES * count)
        start = time.perf_counter()
        for first in range(at, at + TABLES * count, count):
            entries = ids[first : first + count]
            policy.held(entries)
            policy.touched(Run(entries, NO_PARENT, 0, 4096), now[0])
            policy.freed(entries)
            now[0] += 0.01
        return (time.perf_counter() - start) / (TABLES * count)

    def replace() -> float:
        start = time.perf_counter()
        for _ in range(TABLES):
            for gone in policy.victims(count * 4096, now[0]):
                policy.removed(gone)
                put(gone)
        return (time.perf_counter() - start) / (TABLES * count)

    took = interleave({"match": match, "put": replace}, rounds)
    return [
        row("retention of a match 1M", "us_per_block", "us", micro(took["match"]), 1.0),
        row("retention of a put 1M", "us_per_block", "us", micro(took["put"]), 1.0),
    ]


def keys(rounds: int) -> list[Row]:
    """Name the blocks of 131,072 tokens; the bound is a bare loop of blake3 over the same bytes."""
    tokens = np.random.default_rng(3).integers(0, 1 << 17, 131072, dtype=np.uint32)
    rows = []
    for block_tokens in (16, 256):
        layout = kvengine.Layout(
            layers=1,
            kv_heads=1,
            head_dim=16,
            head_dim_v=0,
            dtype="uint8",
            block_tokens=block_tokens,
        )
        with kvengine.open("mem://?size=16M") as engine:
            names = engine.namespace(model="bench", layout=layout)
        bare, ours = bare_loop(names, tokens.tobytes(), 4 * block_tokens), names.keys(tokens).data
        took = interleave(
            {
                "bare": lambda n=names, s=4 * block_tokens: bare_loop(n, tokens.tobytes(), s),
                "keys": lambda n=names: n.keys(tokens),
            },
            rounds,
        )
        found = times(took["bare"], took["keys"])
        case = f"keys 131072 tokens / {block_tokens}"
        rows.append(row(case, "times_bare_blake3", "ratio", found, 1.0, matches=bare == ours))
    return rows


def bare_loop(names: Namespace, data: bytes, step: int) -> bytes:
    """Hash leaves and chain as the keys do, with nothing around it."""
    key, root, made = ROOT_KEY, names.root, []
    for at in range(0, len(data), step):
        key = blake3(key + blake3(data[at : at + step]).digest(), key=root).digest()
        made.append(key)
    return b"".join(made)


def micro(seconds: list[float]) -> Spread:
    return spread([each * 1e6 for each in seconds])
