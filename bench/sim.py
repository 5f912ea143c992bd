"""Clients and the daemon of one host in virtual time, over many seeds.

The scenario is tests/hostsim.py, of which CI runs 1,000 seeds. A row says how many seeds broke a
promise (each is printed), others what they did; "planted" how many of the faults that
tests/test_hostsim.py plants are found, and within how many seeds.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from rich.progress import track

from bench.runner import Row

TESTS = Path(__file__).resolve().parent.parent / "tests"
SEEDS = 20_000
DONE = ("events", "reserved", "committed", "leased", "verified", "kill", "break", "stop", "bump")

if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

import hostsim  # noqa: E402  (tests/hostsim.py)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--seeds` to the command line."""
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"run so many (default {SEEDS:,})"
    )


def run(options: argparse.Namespace) -> list[Row]:
    """Run all seeds, then those that find what is planted."""
    from test_hostsim import PLANTED, WITHIN

    done: Counter[str] = Counter()
    violations = 0
    start = time.perf_counter()
    for seed in track(range(options.seeds), "seeds", disable=not sys.stderr.isatty()):
        try:
            done += hostsim.run(seed)
        except hostsim.Violation as error:
            violations += 1
            print(error, file=sys.stderr)
        if not sys.stderr.isatty() and (seed + 1) % 1000 == 0:
            print(f"{seed + 1} seeds, {violations} violations", file=sys.stderr)
    took_s = time.perf_counter() - start
    rows = [
        row("seeds", "violations", "seeds", violations, not violations),
        row("seeds", "count", "seeds", options.seeds),
        row("seeds", "rate", "seeds/s", options.seeds / took_s),
    ]
    rows += [row("seeds", name, "count", done[name]) for name in DONE]
    for name, plant in PLANTED.items():
        seed, how = hostsim.first_found(plant, WITHIN)
        print(f"planted {name}: {how or 'not found'}", file=sys.stderr)
        rows.append(row(f"planted: {name}", "first_seed", "seed", seed, seed >= 0))
    return rows


def row(case: str, metric: str, unit: str, value: float, well: bool | None = None) -> Row:
    return Row(
        bench="sim",
        case=case,
        metric=metric,
        unit=unit,
        value=float(value),
        matches_reference=well,
    )
