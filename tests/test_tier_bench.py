"""bench.tiers: every path of the disk's rows, on few frames and slots."""

import argparse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """bench.tiers.disk, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.tiers.disk

    return bench.tiers.disk


def test_rows_of_the_disk(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, small in (("TABLES", 1), ("READS_MIN", 20), ("SLOTS", 2000), ("PROMPT", 4)):
        monkeypatch.setattr(bench, name, small)
    rows = {(row.case, row.metric): row for row in bench.run(argparse.Namespace(rounds=9))}
    for case in ("disk durable write 2MiB", "disk cold read 2MiB"):
        assert {m for c, m in rows if c == case} >= {"share_of_raw", "speed", "cpu"}
        assert rows[case, "share_of_raw"].n == 9 and rows[case, "share_of_raw"].matches_reference
        assert rows[f"{case} sealed", "share_of_plain"].matches_reference
    assert rows["disk recover 1M slots", "s"].matches_reference
    assert rows["disk recover 1M slots", "slots"].value == 2000
    twice = rows["cyclic scan 2x memory", "bytes_written_twice"]
    assert twice.value == 0 and twice.matches_reference
    assert rows["disk load 2MiB x4", "first_layer_at"].matches_reference
    assert not list(tmp_path.iterdir())
