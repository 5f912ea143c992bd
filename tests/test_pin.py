"""kvengine.pin, by an engine: memory is pinned behind the scenes, and what fails is counted.

The driver is a fake one: no GPU is needed, and none is shown to work.
"""

import os
from collections.abc import Callable

import pytest

import kvengine
from fake_driver import FakeDriver
from kvengine import pin
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


def test_nothing_is_pinned_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("pinned without being asked to")

    monkeypatch.setattr(pin, "Cuda", never)
    with kvengine.open(memory_bytes=SIZE) as engine:
        assert engine.warm(SOON_S)
        assert engine.metrics.get("pin_failures") == 0
