"""kvengine.transfer: waiting, cancelling, failing, refusing."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvengine
import rig
from kvengine import Engine, Transfer
from kvengine.codec import Raw
from kvengine.transfer import JOBS_MAX

# Two tasks of 8 MiB each way.
OF = rig.layout(layers=4, kv_heads=8, head_dim=128, head_dim_v=128, block_tokens=64)
BLOCKS = 8


class Gate:
    """Holds back encoding or decoding, and counts how often it was begun."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = 0

    def hold(self, work, *given):
        self.begun += 1
        assert self.open.wait(rig.WAIT_S)
        return work(*given)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with kvengine.open("mem://?size=64M&threads=1") as opened:
        yield opened
        opened.check()


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    made = Gate()
    for name in ("encode", "decode"):
        work = getattr(Raw, name)
        monkeypatch.setattr(Raw, name, lambda *given, work=work: made.hold(work, *given))
    yield made
    made.open.set()


def test_save_and_load_return_at_once(engine, gate):
    keys = rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))
    source, target = rig.caches(OF, BLOCKS, 1), rig.caches(OF, BLOCKS)
    saving = engine.save(keys, source, range(BLOCKS))
    assert not saving.done() and not saving.wait(0.001) and not saving.wait_layer(0, 0.001)
    assert engine.probe(keys) == 0
    gate.open.set()
    assert saving.wait(rig.WAIT_S) and saving.done() and saving.blocks == BLOCKS
    gate.open.clear()
    with engine.match(keys) as lease:
        loading = engine.load(lease, target, range(BLOCKS))
    assert not loading.done() and not loading.wait_layer(3, 0.001)
    assert not loading.layer_good(0).any() and loading.blocks == 0
    gate.open.set()
    assert loading.wait_layer(3, rig.WAIT_S) and loading.layer_good(3).all()
    assert loading.wait(rig.WAIT_S) and loading.good.all()
    slots = rig.slots_of(OF, range(BLOCKS))
    assert rig.same(OF, target, slots, source, slots)


@pytest.mark.parametrize("verb", ["save", "load"])
def test_cancel(engine, gate, verb):
    """No copying begins after it, what is whole is right, and the engine is as before."""
    keys = rig.names(engine, OF).keys(rig.prompt(BLOCKS, OF))
    source, target = rig.caches(OF, BLOCKS, 1), rig.caches(OF, BLOCKS)
    if verb == "load":
        gate.open.set()
        rig.save(engine, keys, source)
        gate.open.clear()
    begun = gate.begun
    with engine.match(keys) as lease:
        if verb == "load":
            transfer = engine.load(lease, target, range(BLOCKS))
        else:
            transfer = engine.save(keys, source, range(BLOCKS))
    assert rig.poll(lambda: gate.begun == begun + 1)
    assert not transfer.cancel(0.001)
    gate.open.set()
    assert transfer.cancel() and transfer.done() and transfer.cancelled
    assert gate.begun == begun + 1
    assert not transfer.good.any() and transfer.nbytes == 0
    engine.check()
    if verb == "save":
        assert engine.probe(keys) == 0 and engine.stats()["memory_bytes"] == 0
        assert rig.save(engine, keys, source).good.all()
    assert engine.stats()["corrupt_blocks"] == 0
    assert rig.check_right(engine, keys, source).all()


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_a_codec_that_fails(engine, monkeypatch, name):
    keys = rig.names(engine, OF).keys(rig.prompt(2, OF))
    source = rig.caches(OF, 2, 1)
    if name == "decode":
        rig.save(engine, keys, source)

    def fails(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Raw, name, fails)
        if name == "encode":
            transfer = rig.save(engine, keys, source)
        else:
            transfer = rig.load(engine, keys, rig.caches(OF, 2))
    assert not transfer.good.any() and transfer.error == "RuntimeError: out of luck"
    assert engine.stats()["tier_failures"] >= 1
    assert rig.save(engine, keys, source).good.all()
    assert rig.check_right(engine, keys, source).all()


def test_one_save_fills_what_two_ask_for(engine, gate):
    keys = rig.names(engine, OF).keys(rig.prompt(2, OF))
    source = rig.caches(OF, 2, 1)
    first = engine.save(keys, source, [0, 1])
    second = engine.save(keys, source, [0, 1])
    assert second.wait(1) and not second.good.any() and second.nbytes == 0
    gate.open.set()
    assert first.wait(rig.WAIT_S) and first.good.all()
    assert rig.save(engine, keys, source).good.all()


def test_too_many_transfers_are_refused(engine, gate):
    names = rig.names(engine, rig.layout())
    of = names.layout
    source = rig.caches(of, 1, 1)
    hashes = [number.to_bytes(32, "little") for number in range(JOBS_MAX + 1)]
    transfers = [engine.save(names.keys_of_hashes([each]), source, [0]) for each in hashes]
    assert transfers[-1].wait(1) and transfers[-1].error == "refused"
    gate.open.set()
    assert all(transfer.wait(rig.WAIT_S) for transfer in transfers)
    assert sum(transfer.good.all() for transfer in transfers) == JOBS_MAX
    assert rig.save(engine, names.keys_of_hashes(hashes[-1:]), source).good.all()


def test_nothing_to_do(engine):
    keys = rig.names(engine, OF).keys([])
    assert len(keys) == 0
    cache = rig.caches(OF, 1)
    assert engine.save(keys, cache, []).wait(0)
    with engine.match(keys) as lease:
        transfer = engine.load(lease, cache, [])
    assert transfer.wait(0) and transfer.blocks == 0 and transfer.nbytes == 0
    assert engine.probe(keys) == 0 and engine.drop(keys) == 0


def test_leading_good_blocks():
    transfer = Transfer(4, 1)
    assert transfer.blocks == 0
    transfer.finish(np.array([True, True, False, True]), 3)
    assert transfer.blocks == 2 and transfer.wait(0)
    assert Transfer(0, 1).blocks == 0
