"""Ranks of a model as processes of their own, saving through one daemon: all or a miss."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest

import kvengine
import rig
from test_daemon import Daemon

OF = rig.layout(kv_heads=4, head_parts=4, dtype="float16")
BLOCKS, POOL, WHERE = 5, 8, [7, 0, 3, 6, 2]
RANK = """
import os, sys
import rig, kvengine
from test_ranks import OF, BLOCKS, POOL, WHERE
from kvengine.peer.proxy import Proxy
url, first, last, fill, how = sys.argv[1:]
commit = Proxy.commit
def late(self, made, good=None):
    print("late", flush=True)
    sys.stdin.readline()
    for slot in made.slots.tolist():  # it has not heard that its time is over
        room = self.arena.view(slot, 4 * 8192)
        room[int(first) * 8192 : int(last) * 8192] = bytes(8192 * (int(last) - int(first)))
    return commit(self, made, good)
if how == "dies":
    Proxy.commit = lambda *_: os.kill(os.getpid(), 9)
elif how == "late":
    Proxy.commit = late
heads = int(first), int(last)
with kvengine.open(url) as engine:
    keys = rig.names(engine, OF).part(heads=heads).keys(rig.prompt(BLOCKS, OF))
    own = rig.cut(OF, rig.caches(OF, POOL, 1), (0, OF.layers), heads)
    print("ready", flush=True)
    sys.stdin.readline()
    if fill:
        transfer = engine.save(keys, own, WHERE, fill=fill.encode())
        assert transfer.wait(rig.WAIT_S) and transfer.error is None, transfer.error
        print("saved", flush=True)
        sys.stdin.readline()
    else:
        target = rig.caches(keys.namespace.view.layout, POOL)
        loaded = rig.load(engine, keys, target, WHERE)
        there = rig.slots_of(OF, WHERE)
        assert loaded.good.all() and len(loaded.good) == BLOCKS, loaded.good
        assert rig.same(keys.namespace.view.layout, target, there, own, there)
        assert rig.untouched(keys.namespace.view.layout, target, there)
        print("right", flush=True)
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path, f"mem://?size=4M | file://{tmp_path / 'disk'}?size=64M")
    yield found
    if found.process.poll() is None:
        assert found.stop() == 0


class Ranks:
    """Processes with a range of heads each, one step at a time."""

    def __init__(self, url: str, heads: Sequence[tuple[int, int]], fill: str, **how: int) -> None:
        """how: dies=RANK, or late=RANK."""
        ways = {rank: way for way, rank in how.items()}
        self.each: list[Popen[str]] = [
            rig.start(RANK, url, *mine, fill, ways.get(rank, "")) for rank, mine in enumerate(heads)
        ]
        for rank in range(len(heads)):
            self.expect(rank, "ready")

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.each:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def expect(self, rank: int, said: str) -> None:
        process = self.each[rank]
        line = process.stdout.readline().strip()
        assert line == said, line or process.stderr.read()

    def go(self, said: str) -> None:
        """All at once."""
        for process in self.each:
            process.stdin.write("\n")
            process.stdin.flush()
        for rank, process in enumerate(self.each):
            if process.poll() is None:
                self.expect(rank, said)


def split(ranks: int) -> list[tuple[int, int]]:
    step = OF.kv_heads // ranks
    return [(at, at + step) for at in range(0, OF.kv_heads, step)]


def test_four_ranks_save_and_two_and_one_load(daemon):
    with ExitStack() as stack:
        savers = stack.enter_context(Ranks(daemon.url, split(4), "request 1"))
        pair = stack.enter_context(Ranks(daemon.url, split(2), ""))
        savers.go("saved")
        pair.go("right")
    tokens = rig.prompt(BLOCKS, OF)
    with kvengine.open(daemon.url) as engine:
        keys = rig.names(engine, OF).keys(tokens)
        assert rig.check_right(engine, keys, placed()).all()
        assert engine.stats()["saved_blocks"] == BLOCKS and engine.flush()
    assert daemon.stop() == 0
    daemon.start()
    with kvengine.open(daemon.url) as engine:  # from the disk
        keys = rig.names(engine, OF).keys(tokens)
        assert rig.check_right(engine, keys, placed()).all()


def test_a_rank_that_is_killed_leaves_a_miss_and_nothing_else(daemon):
    tokens = rig.prompt(BLOCKS, OF)
    with Ranks(daemon.url, split(4), "request 1", dies=2) as savers:
        for process in savers.each:
            process.stdin.write("\n")
            process.stdin.flush()
        for rank in (0, 1, 3):
            savers.expect(rank, "saved")
        assert savers.each[2].wait(rig.WAIT_S) == -signal.SIGKILL
        with kvengine.open(daemon.url) as engine:
            keys = rig.names(engine, OF).keys(tokens)
            assert engine.probe(keys) == 0 and not engine.contains(keys).any()

            def given_back() -> bool:
                stats = engine.stats()
                return not stats["reservations"] and not stats["memory_bytes"]

            assert rig.poll(given_back), engine.stats()
            # Another request fills them: a client a rank.
            save(daemon.url, [(heads, b"request 2", 1) for heads in split(4)])
            assert rig.check_right(engine, keys, placed()).all()


def test_a_rank_that_comes_late_writes_over_nothing(tmp_path):
    """Its block is void, another request's is there; what it writes then is seen by nobody."""
    daemon = Daemon(tmp_path, "mem://?size=4M&reservation_s=0.2")
    with Ranks(daemon.url, split(2), "request 1", late=1) as savers:
        for process in savers.each:
            process.stdin.write("\n")
            process.stdin.flush()
        savers.expect(0, "saved")
        savers.expect(1, "late")
        with kvengine.open(daemon.url) as engine:
            keys = rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))

            def saved() -> bool:
                save(daemon.url, [(heads, b"request 2", 1) for heads in split(2)])
                return engine.probe(keys) == BLOCKS

            assert rig.poll(saved)
            assert engine.stats()["quarantined_blocks"] == BLOCKS
            assert rig.check_right(engine, keys, placed()).all()
            savers.each[1].stdin.write("\n")
            savers.each[1].stdin.flush()
            savers.expect(1, "saved")
            assert rig.poll(lambda: engine.stats()["quarantined_blocks"] == 0)
            assert rig.check_right(engine, keys, placed()).all()
    assert daemon.stop() == 0


def test_parts_of_two_fills_are_a_miss(daemon):
    save(daemon.url, [(split(4)[rank], b"a" if rank < 2 else b"b", 1) for rank in range(4)])
    with kvengine.open(daemon.url) as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))
        assert engine.probe(keys) == 0 and not engine.contains(keys).any()
        save(daemon.url, [(heads, b"a", 1) for heads in split(4)[2:]])
        assert rig.check_right(engine, keys, placed()).all(), "the first fill is whole now"


def save(url: str, ranks: Sequence[tuple[tuple[int, int], bytes, int]]) -> None:
    """A client a rank, one after another: its heads, its fill, the seed of its cache."""
    tokens = rig.prompt(BLOCKS, OF)
    for heads, fill, seed in ranks:
        with kvengine.open(url) as engine:
            own = rig.cut(OF, rig.caches(OF, POOL, seed), (0, OF.layers), heads)
            keys = rig.names(engine, OF).part(heads=heads).keys(tokens)
            rig.save(engine, keys, own, WHERE, fill=fill)


def placed() -> rig.Caches:
    """What a whole cache holds of the blocks, in order."""
    return [tuple(each[WHERE] for each in layer) for layer in rig.caches(OF, POOL, 1)]
