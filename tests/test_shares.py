"""kvengine.shares: who may hold how much of memory, and how often one may ask."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine.shares import BURST_S, Rate, Want, shares

SIZES = st.integers(0, 1000)
WANTS = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        Want, SIZES, st.integers(0, 400), st.none() | SIZES, st.sampled_from([0.5, 1.0, 2.0, 8.0])
    ),
    min_size=1,
)


@given(SIZES, WANTS)
def test_shares_are_within_what_is_there_and_what_is_wanted(total, wants):
    got = shares(total, wants)
    assert got.keys() == wants.keys()
    assert sum(got.values()) <= total
    for name, want in wants.items():
        assert 0 <= got[name] <= want.most_bytes
    if sum(want.reserved_bytes for want in wants.values()) <= total:
        for name, want in wants.items():
            assert got[name] >= min(want.most_bytes, want.reserved_bytes), (
                "what is reserved is given"
            )
    # Nothing is left over that somebody wants, but for what rounding leaves.
    if any(got[name] < want.most_bytes for name, want in wants.items()):
        assert total - sum(got.values()) <= len(wants)


@given(SIZES, WANTS)
def test_who_gets_less_than_wanted_is_not_behind_its_weight(total, wants):
    """Max-min: whoever is cut has no less above its reservation, by weight, than any other."""
    got = shares(total, wants)
    if sum(want.reserved_bytes for want in wants.values()) > total:
        return
    over = {
        name: (got[name] - min(want.most_bytes, want.reserved_bytes)) / want.weight
        for name, want in wants.items()
    }
    for name, want in wants.items():
        if got[name] < want.most_bytes:
            slack = len(wants) / 0.5
            assert over[name] >= max(over.values()) - slack


@given(SIZES, WANTS, st.sampled_from("abcdef"), SIZES)
def test_who_wants_more_takes_nothing_of_what_others_have_reserved(total, wants, greedy, more):
    if greedy not in wants or sum(want.reserved_bytes for want in wants.values()) > total:
        return
    grown = wants | {greedy: wants[greedy]._replace(want_bytes=wants[greedy].want_bytes + more)}
    after = shares(total, grown)
    for name, want in wants.items():
        if name != greedy:
            assert after[name] >= min(want.most_bytes, want.reserved_bytes)


def test_shares_by_weight():
    wants = {"a": Want(1000), "b": Want(1000, weight=3.0), "c": Want(10)}
    assert shares(410, wants) == {"a": 100, "b": 300, "c": 10}
    assert shares(410, {"a": Want(1000, 200), "b": Want(1000)}) == {"a": 305, "b": 105}
    assert shares(100, {"a": Want(1000, 300), "b": Want(1000, 100)}) == {"a": 75, "b": 25}
    assert shares(100, {"a": Want(1000, maximum_bytes=30), "b": Want(1000)}) == {"a": 30, "b": 70}
    assert shares(100, {"a": Want(1000, maximum_bytes=0)}) == {"a": 0}
    assert shares(0, {"a": Want(5)}) == {"a": 0}


def test_a_rate_lets_bursts_through_and_no_more_on_average():
    rate = Rate(100.0)
    assert rate.allows(150, 0.0) and rate.allows(50, 0.0) and not rate.allows(1, 0.0)
    assert not rate.allows(150, 1.0) and rate.allows(100, 1.0)
    passed = sum(10 for tick in range(10_000) if rate.allows(10, 1.0 + tick / 1000))
    assert passed == pytest.approx(1000, abs=100 * BURST_S + 10)


def test_a_request_above_the_burst_is_paid_off():
    rate = Rate(10.0)
    assert rate.allows(1000, 5.0)
    assert not rate.allows(1, 90.0) and rate.allows(1, 106.0)
