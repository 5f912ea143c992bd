"""What policies make of a trace at several capacities: a table, and curves as SVG.

Called by `kvengine trace`. Hits count over the last part of the requests alone, so that what a
policy learns from the first part is not scored.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from xml.sax.saxutils import escape

import numpy as np

from kvengine.costs import MODELS, PLACES, Model, Place
from kvengine.errors import ConfigError
from kvengine.policy import UnknownPolicy
from kvengine.policy.named import check_name, policy_of
from kvengine.tiered import Below, play
from kvengine.trace import Trace, optimum, simulate

Known = TypeVar("Known", Model, Place)
OPT = "opt"
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 64, 32, 150, 52


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one capacity of memory.

    `gap_closed`: from LRU (0) to the optimum (1); None: no gap, or not asked. With tiers
    `hit_ratio` is that of memory and tiers together, `memory_ratio` that of memory alone;
    `saved_share` and `saved_s` are what was saved of the seconds of computing.
    """

    policy: str
    blocks: int
    share: float
    hit_ratio: float
    gap_closed: float | None
    accesses_s: float
    memory_ratio: float | None = None
    saved_share: float | None = None
    saved_s: float | None = None


def names(text: str) -> list[str]:
    """Read "adaptive,lru". Raises ConfigError, with the nearest name."""
    try:
        return [check_name(name.strip()) for name in text.split(",")]
    except UnknownPolicy as error:
        raise ConfigError(f"--policy {text}: {error}") from None


def capacities(text: str, trace: Trace) -> list[int]:
    """Read "2%,500": shares of the unique blocks, or numbers of blocks, as numbers of blocks."""
    return [_capacity("--capacity", part.strip(), trace) for part in text.split(",")]


def below(text: str, trace: Trace) -> list[Below]:
    """Read "nvme=20%,s3=100%": tiers below memory, the fastest first, and their capacities."""
    found = []
    for part in text.split(","):
        name, _, room = part.strip().partition("=")
        place = _chosen("--tiers", name, PLACES)
        found.append(Below(place, _capacity(f"--tiers {name}", room, trace)))
    return found


def model_of(name: str) -> Model:
    """Return the costs of a model, by its name. Raises ConfigError, with the nearest name."""
    return _chosen("--model", name, MODELS)


def _chosen(option: str, name: str, known: Mapping[str, Known]) -> Known:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{option} {name}: {hint}expected one of {', '.join(known)}")
    return known[name]


def _capacity(option: str, given: str, trace: Trace) -> int:
    try:
        number = float(given.removesuffix("%"))
        blocks = int(number * trace.unique / 100 if given.endswith("%") else number)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{option} {given}: expected a share of the unique blocks as in 2%, or a number "
            "of blocks"
        ) from None
    if blocks < 1:
        longest = int(np.diff(trace.offsets).max(initial=1))
        raise ConfigError(
            f"{option} {given} is {blocks} of {trace.unique} unique blocks: expected at "
            f"least 1 block; the longest request has {longest}"
        )
    return blocks


def table(
    trace: Trace,
    policies: Sequence[str],
    blocks: Sequence[int],
    scored: float,
) -> list[Point]:
    """Play every policy at every capacity, LRU and the optimum besides.

    scored: the share of the requests, from the end, whose hits count.
    """
    score_from = scored_from(trace, scored)
    points = []
    for capacity in blocks:
        found = {}
        for name in dict.fromkeys(["lru", *policies, OPT]):
            if name == OPT:
                found[name] = optimum(trace, capacity, score_from)
            else:
                found[name] = simulate(trace, policy_of(name), capacity, score_from)
        lru, best = found["lru"].hit_ratio, found[OPT].hit_ratio
        for name, result in found.items():
            gap = (result.hit_ratio - lru) / (best - lru) if best > lru else None
            rate = len(trace.nodes) / max(result.took_s, 1e-9)
            share = capacity / max(1, trace.unique)
            points.append(Point(name, capacity, share, result.hit_ratio, gap, rate))
    return points


def scored_from(trace: Trace, scored: float) -> int:
    """Return the first request that counts. Raises ConfigError for what is no share."""
    if not 0 < scored <= 1:
        raise ConfigError(f"--scored {scored}: expected a share above 0, up to 1")
    return int(trace.requests * (1 - scored))


def tiers_table(
    trace: Trace,
    policies: Sequence[str],
    capacity: int,
    tiers: Sequence[Below],
    model: Model,
    scored: float,
    progress: Callable[[float], None] | None = None,
) -> list[Point]:
    """Play every policy with so much memory and tiers below it, at a model's costs.

    `progress` is told which share of it is done.
    """
    score_from = scored_from(trace, scored)
    share, points = capacity / max(1, trace.unique), []
    chosen = list(dict.fromkeys(["lru", *policies]))
    for number, name in enumerate(chosen):

        def told(requests: int, number: int = number) -> None:
            if progress is not None:
                progress((number + requests / max(1, trace.requests)) / len(chosen))

        start = time.perf_counter()
        found = play(trace, policy_of(name), capacity, tiers, model, score_from, progress=told)
        rate = len(trace.nodes) / max(time.perf_counter() - start, 1e-9)
        memory = found.memory_hits / max(1, found.accesses)
        seconds = (memory, found.saved_share, found.saved_s)
        points.append(Point(name, capacity, share, found.hit_ratio, None, rate, *seconds))
    return points


def svg(points: Sequence[Point], title: str) -> str:
    """Draw hit ratio, or what was saved if known, over capacity (logarithmic), a line a policy."""
    values = {p: p.hit_ratio if p.saved_share is None else max(0.0, p.saved_share) for p in points}
    what = "hit ratio" if points[0].saved_share is None else "share of prefill saved"
    low, high = min(p.share for p in points), max(p.share for p in points)
    top = max(0.01, max(values.values()))
    span = float(np.log(high / low)) or 1.0
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(share: float) -> float:
        return LEFT + (right - LEFT) * float(np.log(share / low)) / span

    def down(ratio: float) -> float:
        return bottom - (bottom - TOP) * ratio / top

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text((LEFT + right) / 2, 20, f"{title}: {what} by capacity"),
        text((LEFT + right) / 2, HEIGHT - 12, "capacity, % of the unique blocks"),
    ]
    for step in range(6):
        y = down(top * step / 5)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#d0d7de" fill="none"/>')
        lines.append(text(LEFT - 8, y + 4, f"{top * step / 5:.2f}", "end"))
    for share in sorted({p.share for p in points}):
        lines.append(text(across(share), bottom + 18, f"{100 * share:.3g}"))
    for number, name in enumerate(dict.fromkeys(p.policy for p in points)):
        color = COLORS[number % len(COLORS)]
        mine = sorted((p.share, values[p]) for p in points if p.policy == name)
        path = " ".join(f"{across(share):.1f},{down(ratio):.1f}" for share, ratio in mine)
        lines.append(f'<polyline points="{path}" stroke="{color}" stroke-width="2" fill="none"/>')
        lines += [
            f'<circle cx="{across(s):.1f}" cy="{down(r):.1f}" r="3" fill="{color}"/>'
            for s, r in mine
        ]
        y = TOP + 8 + 20 * number
        mark = f"M{right + 16} {y}h24"
        lines.append(f'<path d="{mark}" stroke="{color}" stroke-width="2"/>')
        lines.append(text(right + 46, y + 4, name, "start"))
    return "\n".join([*lines, "</svg>"]) + "\n"
