"""kvengine.load: a load in parts, some from a tier, of which any may fail while others go on."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvengine
import rig
from kvengine import Engine, load
from kvengine.cache import PagedCache
from kvengine.codec import Raw
from kvengine.frame import Template, frame_bytes
from kvengine.index import NO_SLOT
from kvengine.store import Store
from kvengine.tiers.disk import DiskTier

OF = rig.layout()
BLOCKS = 12
WINDOW = 3  # blocks
SOURCE = rig.caches(OF, BLOCKS, 1)


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Iterator[Engine]:
    """An engine with a prompt whose first blocks are in memory, the rest on disk, in windows."""
    monkeypatch.setattr(load, "FETCH_BYTES", WINDOW * frame_bytes(OF))
    with kvengine.open(f"mem://?size=4M | file://{tmp_path}?size=64M", threads=2) as opened:
        keys = rig.names(opened, OF).keys(rig.prompt(BLOCKS, OF))
        assert rig.save(opened, keys, SOURCE).good.all() and opened.flush(rig.WAIT_S)
        opened.squeeze(0)
        assert rig.load(opened, keys[:WINDOW], rig.caches(OF, WINDOW)).good.all()
        with opened.match(keys) as lease:
            assert (lease.blocks, lease.in_memory) == (BLOCKS, WINDOW)
        yield opened
        opened.check()
        assert opened.stats()["leases"] == 0


def keys_of(engine: Engine):
    return rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))


def test_windows_and_memory_together(engine):
    """Out of order in the caller's cache; afterwards all of it is in memory."""
    table = np.random.default_rng(0).permutation(BLOCKS)
    target = rig.caches(OF, BLOCKS)
    assert rig.load(engine, keys_of(engine), target, table).good.all()
    here, there = rig.slots_of(OF, table), rig.slots_of(OF, range(BLOCKS))
    assert rig.same(OF, target, here, SOURCE, there)
    with engine.match(keys_of(engine)) as lease:
        assert lease.in_memory == BLOCKS
    assert engine.stats()["fetched_blocks"] == BLOCKS


def fails_at(monkeypatch, owner: type, name: str, turn: int) -> None:
    """Let one call of a method raise, and work before and after."""
    calls, work = [0], getattr(owner, name)

    def call(*given, **named):
        calls[0] += 1
        if calls[0] == turn + 1:
            raise MemoryError("no room for it")
        return work(*given, **named)

    monkeypatch.setattr(owner, name, call)


# What may run out of memory, or be broken, and how many blocks that may cost at most.
FAULTS = [
    (Store, "take_slots", WINDOW),
    (Store, "homes", BLOCKS),
    (Store, "fetched", 0),
    (Template, "read", WINDOW),
    (PagedCache, "moves", WINDOW),
    (Raw, "decode", WINDOW),
    (DiskTier, "read", WINDOW),
]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(("owner", "name", "cost"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_part_that_fails(engine, monkeypatch, owner, name, cost, turn):
    """Its blocks are not good, the others are, and whoever waits is told in the end."""
    target = rig.caches(OF, BLOCKS)
    with monkeypatch.context() as patch:
        fails_at(patch, owner, name, turn)
        if (name, turn) == ("homes", 0):  # nothing has begun
            with pytest.raises(MemoryError):
                rig.load(engine, keys_of(engine), target)
            return
        transfer = rig.load(engine, keys_of(engine), target)
    good = np.flatnonzero(transfer.good).tolist()
    assert len(good) >= BLOCKS - cost
    assert rig.same(OF, target, rig.slots_of(OF, good), SOURCE, rig.slots_of(OF, good))
    assert transfer.nbytes == len(good) * OF.payload_bytes
    if transfer.error:
        assert transfer.error == "MemoryError: no room for it"
        assert engine.stats()["tier_failures"] == 1
    assert transfer.error or len(good) == BLOCKS
    keys = keys_of(engine)
    assert rig.save(engine, keys, SOURCE).good.all()
    assert rig.check_right(engine, keys, SOURCE).all()


def test_not_done_while_another_part_moves(engine, monkeypatch):
    """A part has failed, another still writes to the caller's cache: it is not the caller's yet."""
    gate, begun, decode = threading.Event(), threading.Event(), Raw.decode

    def waits(*given: object) -> None:
        begun.set()
        assert gate.wait(rig.WAIT_S)
        decode(*given)

    monkeypatch.setattr(Raw, "decode", waits)
    fails_at(monkeypatch, PagedCache, "moves", 1)
    target = rig.caches(OF, BLOCKS)
    with engine.match(keys_of(engine)) as lease:
        transfer = engine.load(lease, target, range(BLOCKS))
    assert begun.wait(rig.WAIT_S) and rig.poll(lambda: transfer.error)
    assert not transfer.done() and not transfer.wait(0.02)
    gate.set()
    assert transfer.wait(rig.WAIT_S)
    good = np.flatnonzero(transfer.good).tolist()
    assert len(good) == BLOCKS - WINDOW
    assert rig.same(OF, target, rig.slots_of(OF, good), SOURCE, rig.slots_of(OF, good))


def test_a_save_whose_books_fail(engine, monkeypatch):
    """Nothing is held of it, nothing is lost by it, and it may be tried again."""
    keys = rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF, 5))
    source = rig.caches(OF, BLOCKS, 5)
    for owner, name in ((PagedCache, "moves"), (Template, "write"), (Store, "commit")):
        with monkeypatch.context() as patch:
            fails_at(patch, owner, name, 0)
            transfer = rig.save(engine, keys, source)
        assert not transfer.good.any() and transfer.error == "MemoryError: no room for it"
        assert engine.probe(keys) == 0
        engine.check()
        assert engine.stats()["reservations"] == 0
    assert rig.save(engine, keys, source).good.all()
    assert rig.check_right(engine, keys, source).all()


def test_what_is_fetched_continues_the_block_before_it_in_the_prompt(engine, monkeypatch):
    """Windows of a tier have holes where blocks are in memory: policies are told of chains."""
    runs = []
    keys = keys_of(engine)
    with engine.match(keys) as lease:
        ids = lease.ids.tolist()
    assert rig.load(engine, keys[:2], rig.caches(OF, BLOCKS)).good.all()
    assert rig.load(engine, keys[:6], rig.caches(OF, BLOCKS), [5, 4], first=4).good.all()
    with engine.match(keys) as lease:
        away = np.flatnonzero(engine._store.slots(lease.ids) == NO_SLOT)
    assert len(away) and away[0] > 0 and (np.diff(away) > 1).any()  # there is a hole
    policy = engine._store._policy
    monkeypatch.setattr(policy, "added", lambda run, now: runs.append(run))
    assert rig.load(engine, keys, rig.caches(OF, BLOCKS)).good.all()
    assert sum(len(run.entries) for run in runs) == len(away)
    for run in runs:
        first = ids.index(int(run.entries[0]))
        assert run.entries.tolist() == ids[first : first + len(run.entries)]
        assert run.parent == ids[first - 1]
