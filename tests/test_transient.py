"""kvengine.transient against a plain list."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvengine.transient import Transients

IDS = 12
TABLES = st.lists(st.integers(0, IDS - 1), min_size=1, max_size=5, unique=True)


def table(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "oldest"]), TABLES, st.integers(1, 3)),
        max_size=60,
    )
)
def test_the_books_are_those_of_a_list(steps):
    held: dict[int, int] = {}  # id → pages, the oldest first
    transients = Transients()
    for verb, ids, number in steps:
        leases = np.zeros(IDS, np.int32)
        if verb == "add":
            transients.add(table(ids), number)
            for each in ids:
                held.pop(each, None)
                held[each] = number
        elif verb == "remove":
            transients.remove(table([*ids, 1000]))
            for each in ids:
                held.pop(each, None)
        else:
            leases[ids] = 1
            found = transients.oldest(number, leases).tolist()
            free = [each for each in held if each not in ids]
            assert set(found) <= set(free) and len(found) == len(set(found))
            pages = sum(held[each] for each in found)
            assert pages >= min(number, sum(held[each] for each in free)) or len(found) == len(free)
        if transients._order:
            transients._tidy()
        assert transients.pages == sum(held.values())
        assert sorted(np.concatenate([*transients._order, []]).tolist()) == sorted(held)


def test_the_oldest_go_first_and_stale_names_are_forgotten():
    transients = Transients()
    free = np.zeros(4096, np.int32)
    for turn in range(100):
        transients.add(table([turn, turn + 100]), 2)
    assert sorted(transients.oldest(4, free).tolist()) == [0, 100]
    free[0] = 1
    assert sorted(transients.oldest(4, free).tolist()) == [1, 100]
    for _ in range(5000):
        transients.add(table([7]), 1)
        transients.remove(table([7]))
    assert transients.nbytes < 32 << 10 and transients.pages == 398
