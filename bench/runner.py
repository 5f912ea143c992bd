"""What all benches share: interleaved rounds, quantiles, the row schema, and how rows are shown.

A bench is a module `bench/NAME.py` with `run(options: argparse.Namespace) -> list[Row]`, and with
`add_options(parser)` where it has options besides `--rounds`. It measures ours and the bound
(memcpy, a bare hash, loopback) in turns, so that a slow spell of the machine hits both, and says
the ratio of each round rather than the ratio of two medians.
"""

import argparse
import csv
import functools
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

ROUNDS_MIN = 9
SYSTEM = "kvengine"


@functools.cache
def this_machine() -> str:
    """Name the processor and say how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: what platform says
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


@functools.cache
def this_commit() -> str:
    """Name the commit of this checkout; "-dirty" where files differ; "unknown" without git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        name = git("rev-parse", "--short=12", "--verify", "HEAD")
        return f"{name}{'-dirty' if git('status', '--porcelain') else ''}" if name else "unknown"
    except OSError:
        return "unknown"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. The names are the columns of every JSON and CSV file of the benches.

    `value` is the median over `n` rounds, in `unit`; `p20` and `p80` are its spread. `bound` is
    what the machine gives for the same bytes or work, in the same unit, and `ratio` ours over it.
    `matches_reference` says that the result was compared with a reference and was equal; None
    where there is nothing to compare. `machine` and `commit` fill themselves in.
    """

    bench: str
    case: str
    metric: str
    unit: str
    value: float
    system: str = SYSTEM
    bound: float | None = None
    ratio: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 1
    matches_reference: bool | None = None
    machine: str = msgspec.field(default_factory=this_machine)
    commit: str = msgspec.field(default_factory=this_commit)


COLUMNS = (
    "bench",
    "case",
    "system",
    "metric",
    "unit",
    "value",
    "bound",
    "ratio",
    "p20",
    "p80",
    "n",
    "matches_reference",
    "machine",
    "commit",
)


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile of some rounds, and how many they were."""

    p20: float
    p50: float
    p80: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Give the percentiles of `values` (at least one), interpolated linearly between neighbours."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Spread(at(0.2), at(0.5), at(0.8), len(ordered))


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS_MIN, warmup: int = 2
) -> dict[str, list[float]]:
    """Time each function once a round, and give the seconds of its rounds by its name.

    A function may return its own seconds (a float) where a part of it is preparation; otherwise
    the whole call is timed. The order turns with every round, so that none is always the one
    after the other. The garbage collector rests meanwhile: a full collection between rounds would
    leave every cache cold. At least 9 rounds are made.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, max(rounds, ROUNDS_MIN)):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                said = functions[name]()
                took = time.perf_counter() - start
                if number >= 0:
                    seconds[name].append(said if isinstance(said, float) else took)
    finally:
        if enabled:
            gc.enable()
    return seconds


def share(bound_times: Sequence[float], our_times: Sequence[float]) -> Spread:
    """Give the share of the bound's speed that ours reaches: bound over ours, round by round."""
    return spread([bound / ours for bound, ours in zip(bound_times, our_times, strict=True)])


def times(bound_times: Sequence[float], our_times: Sequence[float]) -> Spread:
    """Give how many times the bound's seconds ours takes: ours over bound, round by round."""
    return share(our_times, bound_times)


def row(
    bench: str,
    case: str,
    metric: str,
    unit: str,
    found: Spread,
    bound: float | None = None,
    matches: bool | None = None,
) -> Row:
    """Give a row of ours: the median and its spread, and what share of the bound that is."""
    return Row(
        bench=bench,
        case=case,
        metric=metric,
        unit=unit,
        value=found.p50,
        bound=bound,
        ratio=None if bound is None else found.p50 / bound,
        p20=found.p20,
        p80=found.p80,
        n=found.n,
        matches_reference=matches,
    )


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list of objects with the columns of the schema."""
    path.write_text(json.dumps([as_columns(row) for row in rows], indent=1) + "\n")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as CSV, under a line with the names of the columns."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(as_columns(row) for row in rows)


def as_columns(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in COLUMNS}


def show(rows: Sequence[Row], console: Console) -> None:
    """Print one table, and below it the machine and commit that all rows share."""
    table = Table(title=rows[0].bench if rows else None, title_justify="left")
    for name in COLUMNS[1:-2]:
        numeric = name in ("value", "bound", "ratio", "p20", "p80", "n")
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(written(getattr(row, name)) for name in COLUMNS[1:-2]))
    console.print(table)
    for line in sorted({f"{row.machine} · commit {row.commit}" for row in rows}):
        console.print(line, highlight=False)


def written(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """Make the reader of `python -m bench NAME [options]`, to which a bench adds its own."""
    found = argparse.ArgumentParser(prog="python -m bench", description="Measure kvengine.")
    found.add_argument("name", choices=names, help="which bench")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    found.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    found.add_argument("--rounds", type=rounds, default=45, help="rounds a case (default 45)")
    return found


def rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < ROUNDS_MIN:
        raise argparse.ArgumentTypeError(f"given {text!r}, expected a number from {ROUNDS_MIN} on")
    return int(text)
