"""kvengine.pin, by an engine: memory is pinned behind the scenes, and what fails is counted.

The driver is a fake one: no GPU is needed, and none is shown to work.
"""

import os
import threading
from collections.abc import Callable

import pytest

import kvengine
from fake_driver import FakeDriver
from kvengine import pin
from kvengine.arena import Arena
from kvengine.kernels import memory
from kvengine.kernels.driver import DriverError

SIZE = 64 << 20
SOON_S = 30.0


def opened(monkeypatch: pytest.MonkeyPatch, driver: Callable[[], object]) -> kvengine.Engine:
    monkeypatch.setattr(pin, "Cuda", driver)
    engine = kvengine.open(memory_bytes=SIZE, pin=True)
    assert engine.warm(SOON_S)
    return engine


def test_memory_is_pinned_until_the_engine_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    with opened(monkeypatch, lambda: driver) as engine:
        assert engine._pin.pinned.wait(SOON_S)
        assert sum(driver.pinned.values()) == SIZE
        assert engine.metrics.get("pin_failures") == 0
        child = os.fork()
        if not child:
            engine.close()
            os._exit(0 if len(driver.pinned) == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert not driver.pinned
    assert engine.metrics.get("pinned_bytes") == 0


def test_without_a_gpu_memory_works_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no CUDA driver")

    def broken() -> None:
        raise DriverError("cuInit: CUDA_ERROR_NO_DEVICE (100)")

    for driver in (missing, broken, lambda: FakeDriver(fails=["register"])):
        with opened(monkeypatch, driver) as engine:
            if engine._pin.pinned is not None:
                assert not engine._pin.pinned.wait(SOON_S)
                engine._pin.pinned._thread.join(SOON_S)  # it counts last
            assert engine.metrics.get("pin_failures") == 1
            assert engine.metrics.get("pinned_bytes") == 0


@pytest.mark.parametrize("fails", [[], ["register"]])
def test_pinning_touches_memory_first(monkeypatch: pytest.MonkeyPatch, fails: list[str]) -> None:
    """Pages lie near the thread that touches them first; what is not pinned is backed after it."""
    driver = FakeDriver(fails=fails)
    monkeypatch.setattr(Arena, "populate", lambda arena: driver.calls.append("populate"))
    with opened(monkeypatch, lambda: driver):
        assert driver.calls == ["register", "populate"]


def test_closing_does_not_wait_for_all_to_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, begun, goes_on = FakeDriver(), threading.Event(), threading.Event()

    def register(address: int, nbytes: int) -> None:
        begun.set()
        assert goes_on.wait(SOON_S)
        FakeDriver.register(driver, address, nbytes)

    driver.register = register
    monkeypatch.setattr(pin, "Cuda", lambda: driver)
    engine = kvengine.open(memory_bytes=4 * memory.CHUNK_BYTES, pin=True)
    assert begun.wait(SOON_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    engine._populating.join(SOON_S)
    assert not engine._populating.is_alive()
    goes_on.set()
    closer.join(SOON_S)
    assert not closer.is_alive() and not driver.pinned


def test_nothing_is_pinned_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("pinned without being asked to")

    monkeypatch.setattr(pin, "Cuda", never)
    with kvengine.open(memory_bytes=SIZE) as engine:
        assert engine.warm(SOON_S)
        assert engine.metrics.get("pin_failures") == 0
