"""The breaker as a state machine: the clock is a number."""

from hypothesis import given
from hypothesis import strategies as st

from kvengine.tiers.breaker import Breaker


def opened(**options) -> Breaker:
    breaker = Breaker(failures_max=1, **options)
    assert breaker.failed(0.0)
    return breaker


def test_opens_after_failures_in_a_row():
    breaker = Breaker(failures_max=3)
    for _ in range(5):
        assert not breaker.failed(0.0) and not breaker.failed(0.0) and breaker.closed
        breaker.succeeded()
    assert [breaker.failed(0.0) for _ in range(4)] == [False, False, True, False]
    assert not breaker.closed


def test_no_trial_while_closed():
    breaker = Breaker()
    assert not breaker.trial(1e9)
    breaker.failed(0.0)
    assert not breaker.trial(1e9) and breaker.closed


def test_one_trial_a_pause_and_the_pauses_double():
    breaker = opened(pause_s=1.0, pause_s_max=4.0)
    tried = [now for now in range(20) if breaker.trial(float(now))]
    assert tried == [1, 3, 7, 11, 15, 19]
    assert not breaker.closed


def test_a_good_trial_closes_it_and_the_next_pause_is_short_again():
    breaker = opened(pause_s=1.0, pause_s_max=60.0)
    assert breaker.trial(1.0) and breaker.trial(3.0)
    breaker.succeeded()
    assert breaker.closed and not breaker.trial(100.0)
    assert breaker.failed(100.0)
    assert not breaker.trial(100.9) and breaker.trial(101.0)


def test_failures_that_come_late_do_not_lengthen_the_pause():
    breaker = opened(pause_s=1.0)
    assert not any(breaker.failed(0.9) for _ in range(9))
    assert breaker.trial(1.0)


@given(st.lists(st.tuples(st.sampled_from("fst"), st.floats(0, 5)), max_size=60))
def test_any_history_comes_back(history):
    breaker, now, row = Breaker(failures_max=2, pause_s=1.0, pause_s_max=8.0), 0.0, 0
    for event, step in history:
        now += step
        if event == "f":
            row += 1
            breaker.failed(now)
        elif event == "s":
            row = 0
            breaker.succeeded()
        else:
            assert not (breaker.trial(now) and breaker.closed)
        assert breaker.closed == (row < 2)
    if not breaker.closed:
        assert breaker.trial(now + 16.0)  # at most two of the longest pauses away
    breaker.succeeded()
    assert breaker.closed
