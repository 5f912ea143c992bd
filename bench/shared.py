"""One host, several processes: a daemon keeps the blocks, this process and others are its clients.

References (match and release of committed blocks of 2 MiB) against a bare round trip of 64 bytes
over a Unix socket between two processes; loads by reference, with copy and verification, against
memcpy; look-ups with a million blocks resident, whose bytes nobody writes.
"""

import argparse
import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import kvengine
from bench import runner
from bench.runner import Row, interleave, share, spread, times
from kvengine.config import parse_url
from kvengine.keys import BlockKeys, Namespace
from kvengine.peer import messages as m
from kvengine.peer.client import Client
from kvengine.peer.proxy import Proxy

row = partial(runner.row, "shared")

MIB = 1 << 20
RESIDENT = 1_000_000
TABLE = 8192
LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 16  # a block of 2 MiB, as Llama-3.1-8B's
BLOCKS = 256
COPIED = 16
CONNECTIONS, ASKED = 64, 16
CLIENTS = 2  # processes that have the connections
ASK_S = 2.0
TRIPS = 200  # a round
TINY = kvengine.Layout(
    layers=1, kv_heads=1, head_dim=16, head_dim_v=0, dtype="uint8", block_tokens=16
)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure references, copies and look-ups, each against a daemon of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            *references(Path(folder), options.rounds),
            *lookups(Path(folder), options.rounds),
        ]


@contextlib.contextmanager
def daemon(folder: Path, url: str) -> Iterator[str]:
    """Run `kvengine serve` in a process of its own; give the URL of its clients."""
    path = folder / "kv.sock"
    command = [sys.executable, "-m", "kvengine.cli", "serve", url, "--socket", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("serving")
        yield f"unix://{path}?timeout_s=30"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


@contextlib.contextmanager
def echo() -> Iterator[Callable[[], None]]:
    """Run a process that sends back what it is sent; give a round trip of 64 bytes."""
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        here.close()
        while data := there.recv(4096):
            there.sendall(data)
        os._exit(0)
    there.close()

    def trip() -> None:
        here.sendall(b"x" * 64)
        here.recv(4096)

    try:
        yield trip
    finally:
        here.close()
        os.waitpid(child, 0)


def opened(url: str) -> Client:
    """Open an engine that is the client of a daemon."""
    engine = kvengine.open(url)
    assert isinstance(engine, Client)
    return engine


def references(folder: Path, rounds: int) -> list[Row]:
    """Measure match and release of blocks of 2 MiB, and loads of them."""
    layout = kvengine.Layout(
        layers=LAYERS, kv_heads=HEADS, head_dim=DIM, head_dim_v=DIM, dtype="float16"
    )
    shape = (BLOCKS, TOKENS, HEADS, DIM)
    with echo() as trip, daemon(folder, "mem://?size=640M") as url, opened(url) as engine:
        # After the fork of `echo`, or each first write to a page would copy it.
        source = np.random.default_rng(0).integers(0, 255, 256 * MIB, dtype=np.uint8)
        target = np.ones(256 * MIB, dtype=np.uint8)
        names = engine.namespace(model="bench", layout=layout)
        # One slab for all layers, aligned, as serving engines allocate it.
        memory = mmap.mmap(-1, LAYERS * 2 * BLOCKS * TOKENS * HEADS * DIM * 2)
        memory.madvise(mmap.MADV_HUGEPAGE)
        slab = np.frombuffer(memory, dtype=np.uint16).reshape(LAYERS, 2, *shape)
        slab[:] = np.random.default_rng(1).integers(0, 1 << 14, slab.shape[1:], dtype=np.uint16)
        slab ^= np.arange(LAYERS, dtype=np.uint16)[:, None, None, None, None, None]
        arrays = [(each[0], each[1]) for each in slab.view(np.float16)]
        cache = engine.cache(names, arrays)
        engine.warm()
        keys = names.keys(np.arange(128 * TOKENS))
        saved = engine.save(keys, cache, np.arange(128))
        saved.wait()
        right = [bool(saved.good.all())]
        copied = [0]

        def reference(count: int) -> float:
            part = keys[:count]
            start = time.perf_counter()
            for _ in range(TRIPS):
                with engine.match(part) as lease:
                    pass
            took = time.perf_counter() - start
            right[0] &= lease.in_memory == count
            return took / TRIPS

        def bare() -> float:
            start = time.perf_counter()
            for _ in range(TRIPS):
                trip()
            return (time.perf_counter() - start) / TRIPS

        def memcpy() -> float:
            at = copied[0] % 8 * 32 * MIB
            start = time.perf_counter()
            np.copyto(target[at : at + 32 * MIB], source[at : at + 32 * MIB])
            return time.perf_counter() - start

        def load() -> float:
            first = copied[0] % 8 * COPIED
            copied[0] += 1
            table = 128 + first + np.arange(COPIED)
            part = keys[:128]
            start = time.perf_counter()
            with engine.match(part) as lease:
                transfer = engine.load(lease, cache, table, first=first)
            transfer.wait()
            took = time.perf_counter() - start
            right[0] &= bool(transfer.good.all())
            right[0] &= np.array_equal(slab[-1, 1, table], slab[-1, 1, table - 128])
            return took

        functions = {
            "bare": bare,
            "single": partial(reference, 1),
            "table": partial(reference, 128),
            "memcpy": memcpy,
            "load": load,
        }
        took = interleave(functions, rounds)
    trips = spread([each * 1e6 for each in took["bare"]])
    single = spread([each * 1e6 for each in took["single"]])
    blocks = spread([each * 1e6 / 128 for each in took["table"]])
    ratio = times(took["bare"], took["single"])
    copy = share(took["memcpy"], took["load"])
    same = right[0]
    return [
        row("reference 2MiB single", "times_unix_round_trip", "ratio", ratio, 1.0, same),
        row("reference 2MiB single", "us", "us", single, trips.p50, same),
        row("reference 2MiB x128", "us_per_block", "us", blocks, matches=same),
        row("fetch copy 2MiB x16", "share_of_memcpy", "ratio", copy, 1.0, same),
    ]


def lookups(folder: Path, rounds: int) -> list[Row]:
    """Measure look-ups with a million blocks resident; no byte of any block is written."""
    size = (RESIDENT + 20_000) * 8192
    with daemon(folder, f"mem://?size={size}&populate=0&lossless=0") as url:
        daemon_socket = parse_url(url).daemon
        assert daemon_socket is not None
        with opened(url) as engine:
            names = engine.namespace(model="bench", layout=TINY)
            proxy = engine._proxy  # what nobody fills is committed: by hand
            table = np.frombuffer(os.urandom(32 * RESIDENT), dtype=np.uint8).reshape(-1, 32)
            for at in range(0, RESIDENT, TABLE):
                _hold(proxy, names.keys_of(table[at : at + TABLE].tobytes()))
            resident = engine.stats()["memory_blocks"]
            random = np.random.default_rng(2)
            right = [resident == RESIDENT]

            def match() -> float:
                keys = names.keys_of(table[random.integers(0, RESIDENT, TABLE)].tobytes())
                start = time.perf_counter()
                lease = engine.match(keys)
                took = time.perf_counter() - start
                right[0] &= lease.blocks == TABLE
                lease.release()
                return took

            took = interleave({"match": match}, rounds)
            found = spread([each * 1e3 for each in took["match"]])
            rows = [row("match 8192 keys", "ms", "ms", found, matches=right[0])]
            rates, late = [], []
            context = get_context("fork")
            for _ in range(max(3, rounds // 9)):
                with context.Pool(CLIENTS) as pool:
                    keys = table[random.integers(0, RESIDENT, (CLIENTS, 64 * ASKED))]
                    work = [(daemon_socket.socket, names, each.tobytes()) for each in keys]
                    done = pool.starmap(_ask, work, chunksize=1)
                rates.append(sum(len(each) * ASKED / ASK_S for each in done))
                every = sorted(seconds for each in done for seconds in each)
                late.append(every[int(len(every) * 0.99)] * 1e3)
            case = f"{CONNECTIONS} connections x {ASKED} keys"
            rows.append(row(case, "lookups_per_s", "keys/s", spread(rates), matches=right[0]))
            rows.append(row(case, "p99_ms", "ms", spread(late), matches=right[0]))
    return rows


def _hold(proxy: Proxy, keys: BlockKeys) -> None:
    """Have blocks resident whose bytes are not written."""
    made = proxy.reserve(keys)
    assert proxy.commit(made) == len(keys)


def _ask(path: str, names: Namespace, keys: bytes) -> list[float]:
    """Ask over many connections at once, each for some keys at a time, for ASK_S.

    Gives the seconds that each request took.
    """
    coder = m.Coder()
    lines = [_Line(path, names, coder) for _ in range(CONNECTIONS // CLIENTS)]
    step = ASKED * 32
    tables = [keys[at : at + step] for at in range(0, len(keys) - step + 1, step)]
    took: list[float] = []
    end = time.perf_counter() + ASK_S
    turn = 0
    while (start := time.perf_counter()) < end:
        for line in lines:
            line.ask(tables[turn % len(tables)])
            turn += 1
        for line in lines:
            assert line.answer() == ASKED
            took.append(time.perf_counter() - start)
    for line in lines:
        line.socket.close()
    return took


class _Line:
    """A connection that only asks."""

    def __init__(self, path: str, names: Namespace, coder: m.Coder) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self._coder = coder
        self._say(m.Hello(1, m.VERSION, m.VERSION, "", b"", False))
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 4)
        for fd in fds:
            os.close(fd)
        facts = {name: getattr(names.identity, name) for name in m.IDENTITY}
        fields = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
        self._say(m.Open(2, facts, fields, False))
        said = self._hear()
        assert isinstance(said, m.Opened)
        self._space = said.numbers[0]

    def ask(self, keys: bytes) -> None:
        self._say(m.Probe(3, self._space, keys, 0, bytes(32)))

    def answer(self) -> int:
        said = self._hear()
        assert isinstance(said, m.Count)
        return said.count

    def _say(self, message: m.Message) -> None:
        self.socket.sendall(self._coder.frame(message))

    def _hear(self) -> m.Answer:
        data = self.socket.recv(1 << 16)
        assert len(data) == 4 + int.from_bytes(data[:4], "little")
        return self._coder.answer(data[4:])
