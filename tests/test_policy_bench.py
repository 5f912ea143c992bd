"""`python -m bench policies`: what it derives, on a trace that is drawn."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from test_trace import drawn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def policies(monkeypatch):
    """bench.policies, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.policies

    return bench.policies


@pytest.fixture
def trace():
    return dataclasses.replace(drawn(120), name="agent_text")


def test_hits_without_rivals(policies, trace, monkeypatch):
    monkeypatch.setattr(policies, "RIVAL_BLOCKS_MIN", 1 << 30)
    rows = policies.hits(trace)
    ratio = {row.case: row.value for row in rows if row.metric == "hit_ratio"}
    closed = {row.case: row.value for row in rows if row.metric == "gap_closed"}
    for percent in policies.CELLS["agent_text"]:
        cell = f"agent_text {percent:g}%"
        assert closed[f"{cell} lru"] == 0 and closed[f"{cell} opt"] == 1
        assert all(ratio[case] <= ratio[f"{cell} opt"] for case in ratio if case.startswith(cell))


def test_libcachesim_is_fed_the_same(policies, require, monkeypatch):
    """The deepest block of a request first; its LRU then hits what ours does."""
    require("libcachesim")
    trace = dataclasses.replace(drawn(1500, sessions=400), name="agent_text")
    fed = policies.accesses(trace)
    assert len(fed) == len(trace.nodes)
    for r in range(trace.requests):
        start, stop = trace.offsets[r], trace.offsets[r + 1]
        assert fed[start:stop].tolist() == trace.path(r).tolist()[::-1]
    monkeypatch.setattr(policies, "CELLS", {"agent_text": (40,)})
    monkeypatch.setattr(policies, "RIVAL_BLOCKS_MIN", 1)
    assert any("libcachesim LRU" in row.case for row in policies.hits(trace))
    apart = {row.case: row.value for row in policies.agreement(trace)}
    assert apart["agent_text 40% lru"] < 1e-9 and apart["agent_text 40% arc"] < 0.5


def test_summary_takes_the_goals_cells(policies):
    rows = []
    for cell, lru, ours in (
        ("mooncake_conversation 2%", 0.1, 0.2),
        ("agentic_code 1%", 0.5, 0.6),
        ("mooncake_synthetic 2%", 0.4, 0.39),
    ):
        for name, value in (("lru", lru), ("adaptive", ours), ("libcachesim LRU", lru + 0.001)):
            rows.append(policies.row(f"{cell} {name}", "hit_ratio", "ratio", value))
            rows.append(policies.row(f"{cell} {name}", "gap_closed", "ratio", (value - lru) * 2))
    found = {row.metric: row.value for row in policies.summary(rows)}
    assert found["gap_closed_mean"] == pytest.approx(0.2)
    assert found["worst_points_below_lru"] == pytest.approx(1.0)


def test_a_node_keeps_its_million(policies, monkeypatch):
    monkeypatch.setattr(policies, "RESIDENT", 128 * 40)
    node = policies.Node(policies.LRU())
    assert node.turn() > 0
    left = sum(len(each) for each in gone(node.policy))
    assert left == 128 * 40


def gone(policy) -> list[np.ndarray]:
    found = []
    for victims in policy.victims(1 << 40, 1e9):
        policy.removed(victims)
        found.append(victims)
    return found
