"""kvengine.workers: what is queued runs, whatever its neighbours do."""

import threading

import pytest

import rig
from kvengine.workers import Workers


@pytest.fixture(params=[1, 3])
def workers(request):
    errors: list[Exception] = []
    made = Workers(request.param, "kvengine-test", errors.append)
    made.errors = errors
    yield made
    assert made.close(rig.WAIT_S)


def test_errors_are_reported_and_the_threads_live(workers):
    def fails() -> None:
        raise ZeroDivisionError

    done = threading.Event()
    for _ in range(10):
        assert workers.submit(fails)
    assert workers.submit(done.set) and done.wait(rig.WAIT_S)
    assert rig.poll(lambda: len(workers.errors) == 10)
    assert {type(each) for each in workers.errors} == {ZeroDivisionError}
    assert sum(thread.is_alive() for thread in workers._threads) == workers.count


def test_close_runs_what_is_queued_and_takes_no_more(workers):
    gate, ran = threading.Event(), []
    for number in range(20):
        workers.submit(lambda n=number: (gate.wait(rig.WAIT_S), ran.append(n)))
    assert not workers.close(0.01)
    assert not workers.submit(lambda: ran.append(99))
    gate.set()
    assert workers.close(rig.WAIT_S) and workers.close(0)
    assert sorted(ran) == list(range(20))


def test_work_may_close_and_submit(workers):
    seen = []

    def work() -> None:
        assert workers.submit(lambda: seen.append(1))
        assert not workers.close(0.01)
        assert not workers.submit(work)
        seen.append(2)

    workers.submit(work)
    assert rig.poll(lambda: sorted(seen) == [1, 2])


def test_what_was_accepted_while_closing_runs():
    for _ in range(200):
        workers = Workers(2, "kvengine-test", lambda error: None)
        accepted, ran = [], []
        start = threading.Barrier(3)

        def submits() -> None:
            start.wait()  # noqa: B023  # joined below
            while workers.submit(lambda: ran.append(1)):  # noqa: B023
                accepted.append(1)  # noqa: B023

        threads = [threading.Thread(target=submits) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        assert workers.close(rig.WAIT_S)
        for thread in threads:
            thread.join()
        assert len(ran) == len(accepted)
