"""kvengine.kernels.memory: chunks are pinned behind the scenes, and stay while they are used.

The driver is a fake one: no GPU is needed, and none is shown to work.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fake_driver import FakeDriver
from kvengine.kernels import memory
from kvengine.kernels.driver import DriverError
from kvengine.kernels.memory import Pinned, Shared, Slab
from kvengine.metrics import Metrics

PAGE = 4096
CHUNK = 4 * PAGE
SOON_S = 10.0


class Stepped(FakeDriver):
    """Registers a chunk for each step that it is given."""

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        self.steps = threading.Semaphore(0)

    def register(self, address: int, nbytes: int) -> None:
        assert self.steps.acquire(timeout=SOON_S)
        super().register(address, nbytes)


@pytest.fixture
def arena() -> Iterator[int]:
    """The address of 10 pages."""
    mapped = mmap.mmap(-1, 10 * PAGE)
    view = np.frombuffer(mapped, np.uint8)
    yield view.ctypes.data
    del view
    mapped.close()


def ignore(what: str, nbytes: int) -> None: ...


def test_chunks_are_registered_one_after_the_other(arena: int) -> None:
    driver, told = Stepped(), []
    pinned = Pinned(driver, arena, 10 * PAGE, lambda *event: told.append(event), CHUNK)
    assert not pinned.covers(arena, 1)
    with pinned.hold(arena, PAGE) as reaches:
        assert not reaches  # this one stages
    driver.steps.release()
    while not pinned.covers(arena, CHUNK):
        assert pinned.wait(0.01) is False
    assert not pinned.covers(arena + CHUNK - 1, 2)
    assert not pinned.covers(arena - 1, 2)
    driver.steps.release(2)
    assert pinned.wait(SOON_S)
    assert pinned.covers(arena, 10 * PAGE) and not pinned.covers(arena, 10 * PAGE + 1)
    assert driver.pinned == {arena: CHUNK, arena + CHUNK: CHUNK, arena + 2 * CHUNK: 2 * PAGE}
    assert pinned.close(SOON_S)
    assert not driver.pinned and not pinned.covers(arena, 1)
    sizes = [CHUNK, CHUNK, 2 * PAGE]
    assert told == [("pinned", n) for n in sizes] + [("unpinned", n) for n in sizes]
    assert pinned.close(SOON_S)  # once more is nothing


def test_unregistering_waits_for_every_transfer(arena: int) -> None:
    driver = FakeDriver()
    pinned = Pinned(driver, arena, 10 * PAGE, ignore, CHUNK)
    assert pinned.wait(SOON_S)
    with pinned.hold(arena, PAGE) as one, pinned.hold(arena + PAGE, PAGE) as two:
        assert one and two
        assert not pinned.close(0.0)
        assert len(driver.pinned) == 3
        with pinned.hold(arena, PAGE) as late:
            assert not late  # nobody begins any more
        closer = threading.Thread(target=pinned.close, args=(SOON_S,))
        closer.start()
    closer.join(SOON_S)
    assert not closer.is_alive() and not driver.pinned


def test_a_refusal_is_counted_and_what_is_pinned_is_used(arena: int) -> None:
    metrics = Metrics()

    def report(what: str, nbytes: int) -> None:
        if what == "failed":
            metrics.add("pin_failures")
        else:
            metrics.set("pinned_bytes", nbytes if what == "pinned" else 0)

    driver = Stepped()
    pinned = Pinned(driver, arena, 10 * PAGE, report, CHUNK)
    driver.steps.release()
    while not pinned.covers(arena, CHUNK):
        pinned.wait(0.01)
    driver.fails.append("register")
    driver.steps.release()
    assert not pinned.wait(SOON_S)
    assert isinstance(pinned.error, DriverError)
    assert pinned.covers(arena, CHUNK) and not pinned.covers(arena + CHUNK, 1)
    driver.fails = ["unregister"]  # the device is gone: closing goes on
    assert pinned.close(SOON_S)
    assert metrics.get("pin_failures") == 1 and metrics.get("pinned_bytes") == 0


def test_closing_ends_the_registration(arena: int) -> None:
    driver = Stepped()
    pinned = Pinned(driver, arena, 10 * PAGE, ignore, CHUNK)
    assert not pinned.close(0.0)  # a chunk is under way
    driver.steps.release(9)
    assert pinned.close(SOON_S)
    assert not driver.pinned
    assert driver.calls.count("register") <= 2


def test_a_forked_child_lets_go(arena: int) -> None:
    driver = FakeDriver()
    pinned = Pinned(driver, arena, 10 * PAGE, ignore, CHUNK)
    assert pinned.wait(SOON_S)
    child = os.fork()
    if not child:
        pinned.detach()
        good = not pinned.covers(arena, 1) and pinned.close(0.0) and len(driver.pinned) == 3
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert pinned.covers(arena, 1) and pinned.close(SOON_S)


@pytest.mark.parametrize(
    ("address", "nbytes", "chunk", "said"),
    [
        (5, PAGE, PAGE, "address 5"),
        (PAGE, 0, PAGE, "size 0"),
        (PAGE, PAGE + 1, PAGE, "size 4097"),
        (PAGE, PAGE, 100, "chunk 100"),
    ],
)
def test_what_is_no_arena_is_named(address: int, nbytes: int, chunk: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}, expected a multiple of 4096 above 0"):
        Pinned(FakeDriver(), address, nbytes, ignore, chunk)


def test_a_slab_is_shared_by_its_handle() -> None:
    driver, other = FakeDriver(), FakeDriver()
    made = Slab(driver, 1000)
    shared = Shared(other, made.handle())
    assert shared.address == made.address and made.address in driver.lent
    shared.close()
    shared.close()
    assert other.calls == ["open", "close"]
    made.close()
    made.close()
    assert driver.freed and not driver.lent
    with pytest.raises(ValueError, match="the slab is closed"):
        made.handle()
    with pytest.raises(ValueError, match="a slab of 0 bytes"):
        Slab(driver, 0)
    other.fails.append("open")
    with pytest.raises(DriverError, match="^open"):
        Shared(other, bytes(64))


def test_a_device_without_room_is_reported() -> None:
    told: list[tuple[str, int]] = []
    driver = FakeDriver(fails=["allocate"])
    assert memory.slab(driver, 5 << 30, lambda *event: told.append(event)) is None
    assert told == [("failed", 5 << 30)]
    driver.fails.clear()
    found = memory.slab(driver, 64, lambda *event: told.append(event))
    assert found is not None and len(told) == 1
    found.close()


def test_processors_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("0-2,8,10-11\n")
    assert memory.processors(1, tmp_path) == {0, 1, 2, 8, 10, 11}
    assert memory.processors(7, tmp_path) == set()
    (tmp_path / "node1" / "cpulist").write_text("\n")
    assert memory.processors(1, tmp_path) == set()


def test_the_thread_runs_near_the_device(arena: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(memory, "processors", lambda node: {node})
    monkeypatch.setattr(os, "sched_setaffinity", lambda *given: moved.append(given))
    driver = FakeDriver()
    driver.numa_node = lambda: 3
    pinned = Pinned(driver, arena, 10 * PAGE, ignore, CHUNK)
    assert pinned.wait(SOON_S) and pinned.close(SOON_S)
    ((thread, found),) = moved
    assert thread != threading.get_native_id() and found == {3}
