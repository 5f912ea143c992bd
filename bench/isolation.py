"""What a client must not reach, learn or hurt that is another's, in full numbers.

The scenarios are those of tests/hostile.py, which CI runs in small; look-ups of what another tenant
has cached are timed here only, against those of what nobody has.
"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import kvengine
from bench.runner import Row
from kvengine.config import Config
from kvengine.server import Server
from kvengine.tenants import Tenants

TESTS = Path(__file__).resolve().parent.parent / "tests"
TRIES, PROBES, CYCLES, REQUESTS = 1_000_000, 20_000, 200, 4_000
BLOCKS = 16

if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

import hostile  # noqa: E402  (tests/hostile.py)
import rig  # noqa: E402


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
    """Run all scenarios; daemons with clients in processes of their own come last."""
    tries, probes, cycles, requests = (
        max(10, int(full * options.share)) for full in (TRIES, PROBES, CYCLES, REQUESTS)
    )
    found = hostile.forged(tries)
    _say(found)
    rows = [
        _row("forged names", "accepted", "tries", found.wrong, not found.wrong),
        _row("forged names", "count", "tries", found.count),
    ]
    alone, flooded = hostile.flooded(requests)
    lost = (alone - flooded) * 100
    rows += [
        _row("another floods", "hit_ratio_alone", "ratio", alone),
        _row("another floods", "hit_ratio", "ratio", flooded),
        _row("another floods", "points_lost", "points", lost, lost <= 1.0),
    ]
    with tempfile.TemporaryDirectory() as folder:
        area = timing(Path(folder), probes)
    rows += [
        _row("look-up of another's prefix", "auc", "ratio", area, abs(area - 0.5) <= 0.02),
        _row("look-up of another's prefix", "count", "probes", probes),
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = hostile.cycles(Path(folder), cycles)
    _say(found)
    rows += [
        _row("kill -9 and SIGSTOP", "wrong", "checks", found.wrong, not found.wrong),
        _row("kill -9 and SIGSTOP", "count", "cycles", cycles),
        _row("kill -9 and SIGSTOP", "checks", "checks", found.count),
    ]
    return rows


def timing(folder: Path, probes: int) -> float:
    """Give how well a look-up's time tells a prefix that another tenant has from one of nobody.

    The area under the curve of hits over false alarms; 0.5: it tells nothing.
    """
    tenants = Tenants(folder / "tenants.json")
    keys_of = {name: tenants.add(name) for name in ("a", "b")}
    server = Server(Config.load("mem://?size=64M")[0], folder / "kv.sock", None, tenants)
    thread = threading.Thread(target=server.run)
    thread.start()

    def opened(name: str) -> kvengine.Engine:
        url = f"unix://{folder}/kv.sock?timeout_s=20&tenant={name}"
        return kvengine.open(Config.load(url, options={"daemon.key": keys_of[name].hex()})[0])

    try:
        of = rig.layout()
        with opened("a") as owner, opened("b") as other:
            mine, names = rig.names(owner, of), rig.names(other, of)
            prompts = [rig.prompt(BLOCKS, of, seed) for seed in range(64)]
            cached, fresh = prompts[::2], prompts[1::2]
            for seed, prompt in enumerate(cached):
                rig.save(owner, mine.keys(prompt), rig.caches(of, BLOCKS, seed=seed))
                assert owner.probe(mine.keys(prompt)) == BLOCKS
            draw = np.random.default_rng(0)
            took: dict[bool, list[int]] = {True: [], False: []}
            for known in draw.permutation(np.arange(probes) % 2 == 0).tolist():
                keys = names.keys((cached if known else fresh)[draw.integers(len(fresh))])
                start = time.perf_counter_ns()
                hits = other.probe(keys)
                took[known].append(time.perf_counter_ns() - start)
                assert not hits
    finally:
        server.stop()
        thread.join()
    return area_under(np.array(took[True]), np.array(took[False]))


def area_under(these: np.ndarray, those: np.ndarray) -> float:
    """Give the chance that one of these is above one of those; a tie counts half."""
    ordered = np.sort(those)
    below = np.searchsorted(ordered, these, "left") + np.searchsorted(ordered, these, "right")
    return float(below.mean() / 2 / len(those))


def _say(found: hostile.Found) -> None:
    for note in found.notes:
        print(note, file=sys.stderr)


def _row(case: str, metric: str, unit: str, value: float, well: bool | None = None) -> Row:
    return Row(
        bench="isolation",
        case=case,
        metric=metric,
        unit=unit,
        value=float(value),
        matches_reference=well,
    )
