"""Pinned blocks stay, soft pins end and have a share, and all of it is given back."""

import numpy as np
import pytest

import kvengine
import rig
from kvengine.errors import ConfigError
from kvengine.pins import FOREVER, Pins

OF = rig.layout()


class Bench:
    """Pins with room for four soft ones, a clock to step, and what was let go."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gone: list[int] = []
        self.pins = Pins(400, lambda: self.now, lambda ids: self.gone.extend(ids.tolist()))

    def add(self, *ids: int, duration_s: float | None = None) -> int:
        keys = [bytes([number % 100]) for number in ids]
        return self.pins.add(keys, np.array(ids, np.int32), 100, duration_s)


def test_soft_pins_end_and_have_a_share():
    bench = Bench()
    assert bench.add(1, 2, 3, duration_s=10) == 3
    assert bench.add(4, 5, 6, duration_s=20) == 1
    assert bench.gone == [5, 6]
    bench.now = 10
    bench.pins.expire()
    assert bench.gone == [5, 6, 1, 2, 3] and len(bench.pins) == 1
    assert bench.add(5, 6, 7, duration_s=20) == 3
    bench.now = FOREVER
    bench.pins.expire()
    assert sorted(bench.gone[5:]) == [4, 5, 6, 7] and len(bench.pins) == 0


def test_a_pin_twice_is_held_once_and_lasts_the_longer():
    bench = Bench()
    assert bench.add(1, duration_s=10) == bench.add(1, duration_s=5) == 1
    assert bench.gone == [1]  # the second hold
    bench.now = 9
    bench.pins.expire()
    assert len(bench.pins) == 1
    assert bench.add(1) == 1  # hard now, and out of the share
    assert bench.add(2, 3, 4, 5, duration_s=5) == 4
    bench.now = 1e6
    bench.pins.expire()
    assert len(bench.pins) == 1 and bench.pins.remove([b"\1", b"\2"]) == 1


def test_a_block_saved_again_is_another_one():
    bench = Bench()
    assert bench.add(1, duration_s=10) == bench.add(101, duration_s=10) == 1
    assert bench.gone == [1] and bench.pins.remove([b"\1"]) == 1 and bench.gone == [1, 101]


def test_pinned_blocks_stay_and_saves_are_refused():
    with kvengine.open("mem://?size=1M", threads=1, lossless=False) as engine:
        names = rig.names(engine, OF)
        room = 32  # blocks of 20 KiB, and to spare
        first = names.keys(rig.prompt(room, OF))
        assert rig.save(engine, first, rig.caches(OF, room, seed=1)).good.all()
        assert engine.pin(first, hard=True) == room
        other = names.keys(rig.prompt(64, OF, seed=2))
        rig.save(engine, other, rig.caches(OF, 64, seed=2))
        assert engine.metrics.get("save_refused_blocks") > 0
        engine.squeeze(0)
        assert engine.probe(first) == room and engine.probe(other) == 0
        assert engine.unpin(first) == room and engine.unpin(first) == 0
        engine.squeeze(0)
        assert engine.probe(first) == 0
        assert rig.save(engine, first, rig.caches(OF, room, seed=1)).good.all()
        soft = engine.pin(first, 3600.0)
        assert 0 < soft < room
        engine.squeeze(0)
        assert engine.probe(first) == soft
        assert engine.drop(first) == soft
        engine.check()


@pytest.mark.parametrize(("duration_s", "hard"), [(None, False), (1.0, True), (0.0, False)])
def test_contradictory_pins_are_refused(duration_s, hard):
    with kvengine.open("mem://?size=1M") as engine:
        with pytest.raises(ConfigError, match="expected a number of seconds"):
            engine.pin(rig.names(engine, OF).keys([]), duration_s, hard=hard)
