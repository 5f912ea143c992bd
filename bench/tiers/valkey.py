"""The Valkey tier against the bare client: the same bytes, SET and GET in pipelines, one server.

The server is redis-server (or valkey-server) on loopback, without persistence. The bare client is
the package `valkey` at its best: one pipeline of 16 without a transaction, memoryviews written as
they are, and reads of 1 MiB from the socket. Both write the same names, so that the server has the
same memory to find for both. Bare neither verifies what it reads nor puts it where it
is wanted; ours does both.
"""

import argparse
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import valkey

from bench import runner
from bench.runner import Row, interleave, share, spread
from bench.tiers import sealer
from bench.tiers.disk import Frames
from kvengine.config import Valkey
from kvengine.metrics import Metrics
from kvengine.seal import Sealer
from kvengine.tiers import Span
from kvengine.tiers.remote import RemoteTier
from kvengine.tiers.valkey import ValkeyClient

row = partial(runner.row, "store")

TABLE = 16
SERVERS = ("valkey-server", "redis-server")
PREFIX = "kvengine:"
START_S, TIMEOUT_S = 30.0, 60.0


def run(options: argparse.Namespace) -> list[Row]:
    """Measure one table of 16 frames of 2 MiB, written and read."""
    frames = Frames(TABLE)
    keys = frames.name()
    sources = [
        span.frame[: span.nbytes] for span in frames.spans(frames.source, keys, range(TABLE))
    ]
    names = [PREFIX + key.hex() for key in keys]
    with server() as port, bare(port) as client:
        config = Valkey(host="127.0.0.1", port=port, timeout_s=TIMEOUT_S)
        metrics = Metrics()
        tier = tier_of(config, metrics)
        sealed = tier_of(config, metrics, "sealed:", sealer())
        got: list[bytes] = []

        def bare_put() -> None:
            pipeline = client.pipeline(transaction=False)
            for name, source in zip(names, sources, strict=True):
                pipeline.set(name, source)
            assert all(pipeline.execute())

        def bare_get() -> None:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.get(name)
            got[:] = pipeline.execute()

        try:
            put = interleave(
                {
                    "bare": bare_put,
                    "ours": lambda: moved(tier.write, frames, keys),
                },
                options.rounds,
            )
            get = interleave(
                {
                    "bare": bare_get,
                    "ours": lambda: moved(tier.read, frames, keys),
                },
                options.rounds,
            )
            both = {
                verb: interleave(
                    {
                        name: partial(moved, getattr(each, verb), frames, keys)
                        for name, each in (("plain", tier), ("sealed", sealed))
                    },
                    options.rounds,
                )
                for verb in ("write", "read")
            }
        finally:
            tier.close()
            sealed.close()
        same = frames.target[:] == frames.source[:] and got == [bytes(s) for s in sources]
        same &= metrics.get("tier_failures") == metrics.get("corrupt_blocks") == 0
    nbytes = sum(len(source) for source in sources)
    return [
        *rows("valkey put 2MiB x16", put, nbytes, same),
        *rows("valkey get 2MiB x16", get, nbytes, same),
        *(
            row(f"valkey {verb} 2MiB x16 sealed", "share_of_plain", "ratio", found, 1.0, same)
            for verb, found in (
                ("put", share(both["write"]["plain"], both["write"]["sealed"])),
                ("get", share(both["read"]["plain"], both["read"]["sealed"])),
            )
        ),
    ]


def tier_of(
    config: Valkey, metrics: Metrics, prefix: str = PREFIX, seal: Sealer | None = None
) -> RemoteTier:
    """Return the tier, as the engine opens it."""
    return RemoteTier(
        ValkeyClient(config),
        metrics,
        lambda keys: None,
        prefix=prefix,
        threads=config.connections,
        timeout_s=TIMEOUT_S,
        seal=seal,
    )


def moved(verb: Callable[..., None], frames: Frames, keys: Sequence[bytes]) -> None:
    """Write all frames out of the source, or read them into the target."""
    memory = frames.source if verb.__name__ == "write" else frames.target
    move(verb, frames.spans(memory, keys, range(TABLE)))


def bare(port: int) -> valkey.Valkey:
    """The package's own client, with the largest reads."""
    pool = valkey.ConnectionPool(host="127.0.0.1", port=port, socket_read_size=1 << 20)
    return valkey.Valkey(connection_pool=pool)


def move(verb, spans: Sequence[Span]) -> None:
    """Write or read a table of a tier, and wait until all of it is reported."""
    over = threading.Semaphore(0)
    results: list[bool] = []

    def report(index: int, good: bool) -> None:
        results.append(good)
        over.release()

    verb(spans, time.monotonic() + TIMEOUT_S, report)
    for _ in spans:
        over.acquire()
    assert all(results), "a frame was not moved"


def rows(case: str, took: dict[str, list[float]], nbytes: int, same: bool) -> list[Row]:
    """Give the share of the bare client's speed, and the speed."""
    found = share(took["bare"], took["ours"])
    speed, bare = (
        spread([nbytes / seconds / 1e9 for seconds in took[name]]) for name in ("ours", "bare")
    )
    return [
        row(case, "share_of_bare_client", "ratio", found, 1.0, same),
        row(case, "GB_per_s", "GB/s", speed, bare.p50, same),
    ]


@contextmanager
def server() -> Iterator[int]:
    """Run a server on a free port of loopback; give the port."""
    program = next(filter(None, map(shutil.which, SERVERS)), None)
    if program is None:
        raise SystemExit(
            f"the bench needs one of {', '.join(SERVERS)} on PATH: install redis-server"
        )
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        with started([*command, "--appendonly", "no", "--dir", folder], port):
            yield port


@contextmanager
def started(command: Sequence[str | Path], port: int) -> Iterator[None]:
    """Run a program until the block ends; begin it once the program listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[0]} did not start") from None
                time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()
