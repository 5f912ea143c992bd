import csv
import gc
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runner(monkeypatch):
    """bench.runner, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.runner

    return bench.runner


def test_columns_are_those_that_every_reader_knows(runner):
    assert runner.COLUMNS == tuple(
        "bench case system metric unit value bound ratio p20 p80 n matches_reference machine "
        "commit".split()
    )
    assert set(runner.COLUMNS) == {field.name for field in msgspec.structs.fields(runner.Row)}


def test_rows_say_where_they_come_from(runner):
    row = runner.Row(bench="x", case="c", metric="m", unit="s", value=1.0)
    assert row.system == "kvengine"
    assert "cores" in row.machine
    assert row.commit


def test_spread_interpolates(runner):
    assert runner.spread([5.0]) == (5, 5, 5, 1)
    assert runner.spread([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (2, 3.5, 5, 6)


def test_share_is_of_each_round(runner):
    assert runner.share([1.0, 10.0, 4.0], [2.0, 20.0, 8.0]) == (0.5, 0.5, 0.5, 3)
    assert runner.times([1.0, 10.0, 4.0], [2.0, 20.0, 8.0]) == (2, 2, 2, 3)
    with pytest.raises(ValueError, match="shorter"):
        runner.share([1.0, 2.0], [1.0])


def test_rounds_are_interleaved_in_turning_order(runner):
    calls = []
    functions = {name: lambda name=name: calls.append((name, gc.isenabled())) for name in "abc"}
    seconds = runner.interleave(functions, rounds=9, warmup=1)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 9, "b": 9, "c": 9}
    orders = ["".join(name for name, _ in calls[i : i + 3]) for i in range(0, 30, 3)]
    assert orders[:4] == ["cab", "abc", "bca", "cab"]
    assert not any(enabled for _, enabled in calls)
    assert gc.isenabled()


def test_at_least_nine_rounds_and_seconds_that_a_function_gives(runner):
    assert runner.interleave({"a": lambda: 0.5}, rounds=1) == {"a": [0.5] * 9}


@pytest.fixture
def benches(tmp_path):
    """A folder with the runner and one small bench."""
    (tmp_path / "bench").mkdir()
    for name in ("__init__.py", "__main__.py", "runner.py"):
        (tmp_path / "bench" / name).write_bytes((ROOT / "bench" / name).read_bytes())
    (tmp_path / "bench" / "small.py").write_text(
        textwrap.dedent(
            """
            from bench.runner import Row

            def add_options(parser):
                parser.add_argument("--good", type=int, default=1)

            def run(options):
                return [Row(bench="small", case="one, two", metric="m", unit="us", value=2.5,
                            bound=2.0, ratio=1.25, n=options.rounds,
                            matches_reference=bool(options.good))]
            """
        )
    )
    return tmp_path


def run_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_bench_prints_a_table_and_writes_json_and_csv(benches):
    done = run_bench(benches, "small", "--rounds", "11", "--json", "a.json", "--csv", "a.csv")
    assert done.returncode == 0, done.stderr
    assert "one, two" in done.stdout
    assert "1.25" in done.stdout
    assert "commit unknown" in done.stdout
    (row,) = json.loads((benches / "a.json").read_text())
    assert (row["system"], row["value"], row["n"], row["p20"]) == ("kvengine", 2.5, 11, None)
    (again,) = csv.DictReader((benches / "a.csv").read_text().splitlines())
    assert list(again) == list(row)
    assert (again["case"], again["matches_reference"], again["p20"]) == ("one, two", "True", "")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("small", "--good", "0"), 1, ""),
        (("large",), 2, "small"),
        (("small", "--rounds", "3"), 2, "expected a number from 9 on"),
        (("small", "--what"), 2, "unrecognized arguments: --what"),
        (("small", "--help"), 0, ""),
        ((), 2, "required"),
    ],
)
def test_status_of_a_bench(benches, arguments, status, says):
    done = run_bench(benches, *arguments)
    assert done.returncode == status
    assert says in done.stderr
