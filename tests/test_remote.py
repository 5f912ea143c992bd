"""The remote tier over a client that is a dict, with a clock that is stepped."""

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

import rig
from kvengine.errors import ConfigError
from kvengine.metrics import Metrics
from kvengine.tiers.remote import ABSENT, FOREIGN, RemoteTier
from test_tiers import frames_of, key_of, made, spans_of


class DictClient:
    """A store in a dict. `away` is raised, `full` takes nothing, `gate` holds threads up."""

    name = "dict"
    batch_bytes = 64 << 10

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.away: Exception | None = None
        self.full = False
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, int]] = []
        self.ends = 10**9  # the connection ends after so many answers

    def _call(self, verb: str, count: int) -> None:
        self.gate.wait(rig.WAIT_S)
        self.calls.append((verb, count))
        if self.away is not None:
            raise self.away

    def _answer(self) -> None:
        self.ends -= 1
        if self.ends < 0:
            raise ConnectionError("ended")

    def get(self, names, targets, until, report: Callable[[int, int], None]) -> None:
        self._call("get", len(names))
        for index, (name, target) in enumerate(zip(names, targets, strict=True)):
            self._answer()
            value = self.held.get(name, b"")
            if len(value) == len(target):
                target[:] = value
            report(index, len(value) if len(value) in (ABSENT, len(target)) else FOREIGN)

    def put(self, names, values, until, report: Callable[[int, bool], None]) -> None:
        self._call("put", len(names))
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            self._answer()
            if not self.full:
                self.held[name] = bytes(value)
            report(index, not self.full)

    def sizes(self, names: Sequence[str], until: float) -> list[int]:
        self._call("sizes", len(names))
        return [len(self.held.get(name, b"")) for name in names]

    def delete(self, names: Sequence[str], until: float) -> None:
        self._call("delete", len(names))
        for name in names:
            self.held.pop(name, None)

    def ping(self, until: float) -> None:
        self._call("ping", 0)

    def close(self) -> None:
        self.calls.append(("close", 0))

    def detach(self) -> None:
        pass


class Rigged:
    def __init__(self, **options) -> None:
        self.client, self.metrics, self.now = DictClient(), Metrics(), [0.0]
        self.lost: list[bytes] = []
        self.tier = RemoteTier(
            self.client,
            self.metrics,
            self.lost.extend,
            prefix="p/",
            timeout_s=1.0,
            clock=lambda: self.now[0],
            **({"threads": 1} | options),
        )

    def run(self, verb, spans, deadline: float = 1e9) -> list[bool]:
        results: dict[int, bool] = {}
        over = threading.Semaphore(0)

        def report(index: int, good: bool) -> None:
            assert index not in results
            results[index] = good
            over.release()

        verb(spans, deadline, report)
        for _ in spans:
            assert over.acquire(timeout=rig.WAIT_S)
        return [results[index] for index in range(len(spans))]

    def write(self, frames) -> list[bool]:
        return self.run(self.tier.write, spans_of(frames, True))

    def read(self, frames) -> list[bool]:
        return self.run(self.tier.read, spans_of(frames, False))

    def settle(self) -> None:
        """Wait until the one thread has done what is queued."""
        over = threading.Event()
        assert self.tier._workers.submit(over.set) and over.wait(rig.WAIT_S)


@pytest.fixture
def rigged() -> Iterator[Rigged]:
    found = Rigged()
    yield found
    found.client.gate.set()
    found.tier.close()


def test_names_are_prefix_and_hex(rigged):
    rigged.write(frames_of(1))
    assert list(rigged.client.held) == ["p/" + key_of(0).hex()]


def test_a_table_is_cut_into_batches(rigged):
    frames = frames_of(8)  # of 20 KiB: three fit into 64 KiB
    assert rigged.write(frames) == [True] * 8
    assert rigged.client.calls == [("put", 3), ("put", 3), ("put", 2)]


def test_a_connection_that_ends_in_the_middle_keeps_what_arrived(rigged):
    frames = frames_of(3)
    rigged.write(frames)
    rigged.client.ends = 2
    assert rigged.read(frames) == [True, True, False]
    assert rigged.lost == [], "away is not lost"
    assert rigged.metrics.get("tier_failures", tier="dict") == 1


def test_failures_in_a_row_open_the_breaker_and_a_trial_behind_closes_it(rigged):
    frames = frames_of(1)
    rigged.write(frames)
    rigged.client.away = ConnectionError("away")
    assert [rigged.read(frames) for _ in range(3)] == [[False]] * 3
    calls = len(rigged.client.calls)
    assert rigged.read(frames) == rigged.write(frames) == [False]
    assert rigged.tier.find([key_of(0)], 1e9) == [-1]
    rigged.settle()
    assert len(rigged.client.calls) == calls, "nothing is sent while it is open"
    rigged.now[0] = 0.3
    assert rigged.read(frames) == [False]  # this one only sets the trial off
    rigged.settle()
    assert rigged.client.calls[calls:] == [("ping", 0)]
    rigged.client.away = None
    assert rigged.read(frames) == [False]
    rigged.now[0] = 1.0
    rigged.read(frames)
    rigged.settle()
    assert rigged.read(frames) == [True]


def test_a_find_that_fails_has_a_connection_made_behind(rigged):
    rigged.client.away = ConnectionError("no connection yet")
    assert rigged.tier.find([key_of(0)], 1e9) == [-1]
    rigged.client.away = None
    rigged.settle()
    assert rigged.client.calls == [("sizes", 1), ("ping", 0)]
    assert rigged.tier.find([key_of(0)], 1e9) == [0]


def test_an_error_of_the_clients_own_reports_and_the_thread_lives(rigged):
    frames = frames_of(2)
    rigged.client.away = ValueError("a bug")
    assert rigged.read(frames) == [False, False]
    assert rigged.metrics.get("tier_failures") == 1
    rigged.client.away = None
    assert rigged.write(frames) == [True, True]


def test_a_trial_that_meets_a_config_error_is_a_failure(rigged):
    rigged.client.away = ConfigError("the bucket is gone")
    rigged.tier._mend()
    rigged.settle()
    assert rigged.metrics.get("tier_failures") == 1


def test_a_full_store_is_left_alone_by_writes_and_still_read(rigged):
    frames = frames_of(9)
    rigged.write(frames[:1])
    rigged.client.full = True
    assert rigged.write(frames) == [False] * 9
    calls = len(rigged.client.calls)
    assert rigged.write(frames) == [False] * 9
    assert len(rigged.client.calls) == calls
    assert rigged.read(frames[:1]) == [True]
    rigged.client.full = False
    rigged.now[0] = 0.3
    assert rigged.write(frames) == [True] * 9


def test_the_queue_is_bounded_by_bytes():
    rigged = Rigged(queue_bytes=100 << 10)
    try:
        rigged.client.gate.clear()
        results: list[bool] = []
        spans = spans_of(frames_of(12), True)  # 240 KiB in batches of 60
        rigged.tier.write(spans, 1e9, lambda _, good: results.append(good))
        refused = len(results)
        assert 0 < refused < 12 and not any(results)
        rigged.client.gate.set()
        rigged.settle()
        assert len(results) == 12 and sum(results) == 12 - refused
        assert rigged.write(frames_of(3)) == [True] * 3
    finally:
        rigged.client.gate.set()
        rigged.tier.close()


def test_a_frame_larger_than_the_queue_still_passes():
    rigged = Rigged(queue_bytes=1)
    try:
        assert rigged.write(frames_of(1)) == [True]
    finally:
        rigged.tier.close()


def test_what_is_foreign_is_deleted_and_lost(rigged):
    frames = frames_of(3)
    rigged.write(frames)
    rigged.client.held["p/" + key_of(0).hex()] = b"short"
    rigged.client.held["p/" + key_of(1).hex()] = made(77)
    assert rigged.read(frames) == [False, False, True]
    assert rigged.lost == [key_of(0), key_of(1)]
    assert rigged.metrics.get("corrupt_blocks", tier="dict") == 2
    rigged.settle()
    rigged.settle()
    assert list(rigged.client.held) == ["p/" + key_of(2).hex()]


def test_what_is_dropped_is_gone_before_it_is_deleted(rigged):
    frames = frames_of(3)
    keys = [key for key, _ in frames]
    rigged.write(frames)
    rigged.client.away = ConnectionError("away")
    rigged.tier.drop(keys[:2])
    rigged.settle()
    rigged.client.away = None
    assert len(rigged.client.held) == 3
    assert rigged.tier.find(keys, 1e9) == [0, 0, len(frames[2][1])]
    assert rigged.write(frames[:1]) == [True]  # written over: not to be deleted any more
    assert rigged.tier.find(keys, 1e9) == [len(frames[0][1]), 0, len(frames[2][1])]
    rigged.tier.drop([])
    rigged.tier._mend()
    rigged.settle()
    assert sorted(rigged.client.held) == sorted("p/" + keys[index].hex() for index in (0, 2))


def test_a_deletion_that_fails_once_is_made_up_for(rigged):
    rigged.write(frames_of(2))
    failing = rigged.client.delete

    def once(names: Sequence[str], until: float) -> None:
        rigged.client.delete = failing
        raise ConnectionError("ended")

    rigged.client.delete = once
    rigged.tier.drop([key_of(1)])
    assert rig.poll(lambda: len(rigged.client.held) == 1)


def test_a_block_that_is_being_deleted_is_written_after_that():
    rigged = Rigged(threads=2)
    try:
        frames = frames_of(2)
        rigged.write(frames)
        rigged.client.gate.clear()
        rigged.tier.drop([key_of(1)])
        assert rig.poll(lambda: rigged.tier._deleting)
        results: list[bool] = []
        rigged.tier.write(spans_of(frames, True), 1e9, lambda _, good: results.append(good))
        rigged.client.gate.set()
        assert rig.poll(lambda: len(results) == 2) and all(results)
        assert len(rigged.client.held) == 2
        assert [verb for verb, _ in rigged.client.calls] == ["put", "delete", "put"]
    finally:
        rigged.client.gate.set()
        rigged.tier.close()


def test_a_deletion_that_does_not_end_costs_its_block_only(rigged):
    frames = frames_of(2)
    rigged.write(frames)
    rigged.tier._deleting = frozenset(["p/" + key_of(1).hex()])
    spans = spans_of(frames, True)
    assert rigged.run(rigged.tier.write, spans, deadline=0.05) == [True, False]


def test_closed_once(rigged):
    rigged.tier.close()
    rigged.tier.close()
    assert rigged.client.calls.count(("close", 0)) == 1
    assert rigged.read(frames_of(1)) == [False]
