"""kvengine.peer.ring: who owns a stripe, the same everywhere, moving only what must move."""

import math

import numpy as np
import pytest

from kvengine.errors import ConfigError
from kvengine.peer.ring import STRIPE_BLOCKS, WARM_S, Member, Ring, stripes, weight

GIB = 1 << 30
RANDOM = np.random.default_rng(7)
STRIPES = RANDOM.integers(0, 1 << 64, 20_000, dtype=np.uint64)


def members(count: int, large: int = 4) -> list[Member]:
    """Nodes on hosts of their own, every fourth with four times the memory."""
    names = np.random.default_rng(count).integers(1, 1 << 63, count)
    return [
        Member(int(name), GIB * (large if index % 4 == 0 else 1), f"host{index}")
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("count", [1, 4, 8, 32])
def test_load_follows_capacity(count):
    nodes = members(count)
    got = np.bincount(Ring(nodes).owners(STRIPES)[:, 0], minlength=count) / len(STRIPES)
    fair = np.array([weight(node) for node in nodes])
    fair /= fair.sum()
    assert np.abs(got - fair).max() < 5 * math.sqrt(fair.max() / len(STRIPES))


def test_owners_do_not_depend_on_the_order_of_members():
    nodes = members(9)
    there, back = Ring(nodes), Ring(nodes[::-1])
    assert (there.owners(STRIPES, 3) == 8 - back.owners(STRIPES, 3)).all()


def test_a_node_that_leaves_moves_its_own_share_alone():
    nodes = members(8)
    before, after = Ring(nodes).owners(STRIPES, 2), Ring(nodes[1:]).owners(STRIPES, 2) + 1
    kept = before[:, 0] != 0
    assert (before[kept, 0] == after[kept, 0]).all()
    assert (after[~kept, 0] == before[~kept, 1]).all(), "the second owner follows the first"


def test_a_node_that_joins_takes_from_others_and_moves_nothing_between_them():
    nodes = members(8)
    before, after = Ring(nodes[:7]).owners(STRIPES)[:, 0], Ring(nodes).owners(STRIPES)[:, 0]
    assert ((after == before) | (after == 7)).all()


def test_a_fresh_node_takes_its_share_by_and_by():
    nodes = members(4, large=1)
    loads = []
    for age in (0.0, WARM_S / 2, WARM_S, 10 * WARM_S):
        ring = Ring([*nodes[:3], nodes[3]._replace(age_s=age)])
        loads.append(float((ring.owners(STRIPES)[:, 0] == 3).mean()))
    assert 0 < loads[0] < 0.06 < loads[1] < 0.2 < loads[2] == loads[3]


def test_small_changes_of_capacity_move_nothing():
    assert weight(Member(1, GIB)) == weight(Member(1, GIB + GIB // 20)) < weight(Member(1, 2 * GIB))
    assert weight(Member(1, 0)) == 0.0


def test_copies_go_to_distinct_racks_then_hosts():
    nodes = [
        Member(number + 1, GIB, f"host{number // 2}", f"rack{number // 4}") for number in range(8)
    ]
    owners = Ring(nodes).owners(STRIPES[:2000], 4)
    racks, hosts = owners // 4, owners // 2
    assert (np.sort(racks[:, :2], axis=1) == [0, 1]).all()
    assert (np.sort(hosts, axis=1) == [0, 1, 2, 3]).all()
    assert all(len(set(row)) == 4 for row in owners.tolist())


def test_more_copies_than_members():
    owners = Ring(members(2)).owners(STRIPES[:10], 3)
    assert (owners[:, 2] == -1).all() and (np.sort(owners[:, :2], axis=1) == [0, 1]).all()
    assert (Ring([]).owners(STRIPES[:3], 2) == -1).all()
    assert Ring(members(2)).owners(STRIPES[:0], 2).shape == (0, 2)
    nothing = [Member(1, 0), Member(2, GIB)]
    assert (Ring(nothing).owners(STRIPES[:10], 2) == [1, -1]).all(), "no capacity, no blocks"


def test_two_nodes_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="one name"):
        Ring([Member(1, GIB), Member(1, GIB)])


def test_stripes_of_a_table():
    keys = RANDOM.integers(0, 1 << 64, (40, 4), dtype=np.uint64)
    found = stripes(keys, 2 * STRIPE_BLOCKS)
    assert len(found) == 40 and len(np.unique(found)) == 3
    assert (found[:16] == keys[0, 0]).all() and (found[32:] == keys[32, 0]).all()
    assert (stripes(keys[16:], 3 * STRIPE_BLOCKS) == found[16:]).all()
    with pytest.raises(ConfigError, match="multiple of 16"):
        stripes(keys, 5)
    assert len(stripes(keys[:0], 0)) == 0
