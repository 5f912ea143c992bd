"""kvengine.writer: when a tier is written to, how much at a time, and what a slow one costs."""

import numpy as np
import pytest

import kvengine
import rig

OF = rig.layout()
PAGE = 4096
FRAME = 5 * PAGE
ROOM = 64  # blocks that memory has room for
SOURCE = rig.caches(OF, 8, 1)


class Slow:
    """A tier in a dict that ends its writes when the test says so."""

    name, remote, away, nbytes = "slow", False, False, 0

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.begun: list = []
        self.waits = True

    def scan(self):
        return iter(())

    def read(self, spans, deadline, report):
        for index, span in enumerate(spans):
            span.frame[: span.nbytes] = self.held[span.key]
            report(index, True)

    def write(self, spans, deadline, report) -> None:
        self.begun += [(span, index, report) for index, span in enumerate(spans)]
        if not self.waits:
            self.end()

    def end(self, count: int = 1 << 30) -> None:
        """End writes, in order, with those that are begun meanwhile."""
        while self.begun and count:
            span, index, report = self.begun.pop(0)
            self.held[span.key] = bytes(span.frame[: span.nbytes])
            count -= 1
            report(index, True)

    def drop(self, keys):
        for key in keys:
            self.held.pop(key, None)

    def close(self): ...

    def detach(self): ...


@pytest.fixture
def tier() -> Slow:
    return Slow()


@pytest.fixture
def opened(monkeypatch, tier):
    """Open an engine above the tier, with marks in blocks."""
    monkeypatch.setattr(kvengine.Engine, "_open_tiers", lambda self: self._tiers.append(tier))
    made = []

    def open_(low: int = 0, high: int = 0) -> kvengine.Engine:
        marks = (low * FRAME, high * FRAME)
        monkeypatch.setattr(kvengine.Engine, "_marks", lambda self, tier: marks)
        made.append(kvengine.open(f"mem://?size={ROOM * FRAME}"))
        return made[-1]

    yield open_
    tier.waits = False
    tier.end()
    for engine in made:
        engine.check()
        engine.close()


def save(engine, number: int, blocks: int = 8):
    keys = rig.names(engine, OF).keys(rig.prompt(blocks, OF, number))
    assert rig.save(engine, keys, SOURCE).good.all()
    return keys


def settled(engine) -> None:
    """The tier has been given what it is given now."""
    (writer,) = engine._writers
    writer.pump()
    assert rig.poll(lambda: not (writer._wanted or writer._turn.locked()))


def test_at_once_and_no_more_than_a_quarter_of_memory_at_a_time(opened, tier):
    engine = opened()
    save(engine, 0)
    assert rig.poll(lambda: len(tier.begun) == 8)
    for number in range(1, 5):
        save(engine, number)
    settled(engine)
    assert 16 <= len(tier.begun) <= 24
    tier.waits = False
    tier.end()
    assert engine.flush(rig.WAIT_S) and len(tier.held) == 40


def test_up_to_the_low_mark_nothing_is_written(opened, tier):
    tier.waits = False
    engine = opened(low=16, high=32)
    for number in range(2):
        save(engine, number)
    settled(engine)
    assert not tier.held
    save(engine, 2)
    settled(engine)
    assert 8 <= len(tier.held) <= 16, "down to the mark, a table at a time"
    assert engine.stats()["unwritten_blocks"] <= 16
    assert engine.flush(rig.WAIT_S) and len(tier.held) == 24
    save(engine, 3)
    settled(engine)
    assert len(tier.held) == 24, "a flush ends with what it has written"


def test_what_is_dropped_in_time_is_never_written(opened, tier):
    tier.waits = False
    engine = opened(low=16, high=16)
    first, second = save(engine, 0), save(engine, 1)
    assert engine.drop(first) == 8
    engine.drop(second[4:])
    assert engine.flush(rig.WAIT_S)
    assert sorted(tier.held) == sorted(second.key(index) for index in range(4))
    assert engine.stats()["memory_blocks"] == 4


def test_between_the_marks_one_table_is_under_way(opened, tier):
    engine = opened(low=0, high=16)
    for number in range(2):
        save(engine, number)
    settled(engine)
    assert len(tier.begun) == 8
    tier.end(4)
    settled(engine)
    assert len(tier.begun) == 4, "the next is begun when it has ended"
    tier.end(4)
    assert len(tier.begun) == 8
    save(engine, 2)
    save(engine, 3)
    settled(engine)
    assert len(tier.begun) >= 16, "above the high mark more of them are"


def test_room_is_found_above_a_tier_that_hangs(opened, tier):
    """No save waits for it, none is refused: what has waited longest is not written any more."""
    engine = opened()
    for number in range(40):
        keys = save(engine, number)
        with engine.match(keys) as lease:
            assert lease.in_memory == 8
    stats = engine.stats()
    assert stats["save_refused_blocks"] == 0
    assert stats["unwritten_blocks"] <= ROOM
    assert engine.metrics.get("write_skipped_blocks", tier="slow") > 40 * 8 - 2 * ROOM
    under_way = {span.key for span, _, _ in tier.begun}
    assert len(under_way) <= ROOM // 4 + 8
    tier.waits = False
    tier.end()
    assert engine.flush(rig.WAIT_S)
    assert under_way <= tier.held.keys(), "what was being written stayed where it was"
    assert rig.check_right(engine, keys, SOURCE).all()


def test_a_prompt_that_goes_on_above_a_tier_that_hangs(opened, tier):
    """Its first blocks cannot go before the last ones, which wait as well."""
    engine = opened()
    names = rig.names(engine, OF)
    keys = names.keys(rig.prompt(120, OF))
    for at in range(0, 120, 8):
        part = keys[at : at + 8]
        assert rig.save(engine, part, SOURCE, np.arange(8)).good.all()
    with engine.match(keys) as lease:
        assert lease.blocks > 0


@pytest.mark.parametrize(
    ("low", "high", "durable", "says"),
    [
        (0.5, 0.25, False, "clean_low is 0.5, above disk.clean_high 0.25"),
        (0.1, 0.5, True, "disk.durable is on, which writes at once"),
        (-0.1, 0.5, False, "a share of memory from 0 to 1"),
        (0.1, 1.5, False, "a share of memory from 0 to 1"),
    ],
)
def test_marks_that_cannot_be(low, high, durable, says):
    with pytest.raises(kvengine.ConfigError, match=says):
        kvengine.config.Disk(path="/kv", clean_low=low, clean_high=high, durable=durable)


def test_the_marks_of_a_disk_are_shares_of_memory(tmp_path):
    url = f"mem://?size=4M | file://{tmp_path}?size=64M&clean_low=0.25&clean_high=0.5"
    with kvengine.open(url) as engine:
        assert engine._marks(engine._tiers[0]) == (1 << 20, 2 << 20)
        keys = save(engine, 0)
        settled(engine)
        assert engine.stats()["disk_blocks"] == 0
    with kvengine.open(url) as engine:
        assert engine.probe(rig.names(engine, OF).keys(rig.prompt(8, OF, 0))) == len(keys)
