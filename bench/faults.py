"""What befalls a disk tier, in full numbers: power loss, kill -9, failing calls, flipped bits.

The scenarios are those of tests/faults.py, which CI runs in small. "mutations" removes each guard
of the tier in turn, and counts those whose check fails without it. A row of a count is there beside
each row of what went wrong; any note of a failure is printed, with its seed.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from bench.runner import Row

TESTS = Path(__file__).resolve().parent.parent / "tests"
STATES, CYCLES, FLIPS = 100_000, 500, 200_000
CHUNK = 5_000

if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

import faults  # noqa: E402  (tests/faults.py)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--share` to the command line."""
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        metavar="X",
        help="do this share of the full numbers (default 1)",
    )


def run(options: argparse.Namespace) -> list[Row]:
    """Run all scenarios."""
    states, cycles, flips = (max(1, int(full * options.share)) for full in (STATES, CYCLES, FLIPS))
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        chunks = [min(CHUNK, states - at) for at in range(0, states, CHUNK)]
        rows += found_rows("power loss states", list(pool.map(_power_loss, enumerate(chunks))))
        chunks = [min(CHUNK, flips - at) for at in range(0, flips, CHUNK)]
        flipped = list(pool.map(_bit_flips, enumerate(chunks)))
        step = max(1, round(1 / options.share) // 10)
        rows += found_rows("io faults", [pool.submit(faults.io_faults, step=step).result()])
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        rows += found_rows("kill -9 cycles", [faults.kill_9(Path(folder) / "disk", cycles)])
    count, found = (sum(getattr(each, name) for each in flipped) for name in ("count", "found"))
    say(flipped)
    rows += [
        row("bit flips", "found_fraction", "ratio", found / count, found == count),
        row("bit flips", "count", "flips", count),
    ]
    mutations = faults.MUTATIONS[: max(1, round(options.share * len(faults.MUTATIONS)))]
    left = [mutation.name for mutation in mutations if faults.survives(mutation)]
    for name in left:
        print(f"no check notices the end of: {name}", file=sys.stderr)
    guards = len(mutations)
    rows += [
        row("mutations", "killed_fraction", "ratio", 1 - len(left) / guards, not left),
        row("mutations", "count", "guards", guards),
    ]
    return rows


def _power_loss(chunk: tuple[int, int]) -> "faults.Found":
    seed, states = chunk
    return faults.power_loss(states=states, seed=seed)


def _bit_flips(chunk: tuple[int, int]) -> "faults.Flips":
    seed, flips = chunk
    return faults.bit_flips(flips=flips, seed=seed)


def found_rows(case: str, parts: "list[faults.Found]") -> list[Row]:
    """Sum up what several processes have found."""
    say(parts)
    sums = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("count", "wrong", "lost", "refused", "acked")
    }
    rows = [
        row(case, "wrong_bytes", "blocks", sums["wrong"], not sums["wrong"]),
        row(case, "acknowledged_lost", "blocks", sums["lost"], not sums["lost"]),
        row(case, "refused", "directories", sums["refused"], not sums["refused"]),
        row(case, "count", "runs", sums["count"]),
        row(case, "acknowledged", "blocks", sums["acked"]),
    ]
    worst_s = max(part.worst_s for part in parts)
    return [*rows, row(case, "recovery_s", "s", worst_s)] if worst_s else rows


def say(parts: "list[faults.Found] | list[faults.Flips]") -> None:
    for part in parts:
        for note in part.notes:
            print(note, file=sys.stderr)


def row(case: str, metric: str, unit: str, value: float, well: bool | None = None) -> Row:
    return Row(
        bench="faults",
        case=case,
        metric=metric,
        unit=unit,
        value=float(value),
        matches_reference=well,
    )
