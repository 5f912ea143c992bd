"""What policies make of a trace at several capacities: a table, curves as SVG, and other formats.

Called by `kvengine trace`. Hits count over the last part of the requests alone, so that what a
policy learns from the first part is not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec
import numpy as np

from kvengine.errors import ConfigError, TraceError
from kvengine.policy import UnknownPolicy
from kvengine.policy.named import check_name, policy_of
from kvengine.trace import Trace, optimum, simulate

OPT = "opt"
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 64, 32, 150, 52


@dataclass(frozen=True, slots=True)
class Point:
    """One policy at one capacity. `gap_closed`: from LRU (0) to the optimum (1); None: no gap."""

    policy: str
    blocks: int
    share: float
    hit_ratio: float
    gap_closed: float | None
    accesses_s: float


def names(text: str) -> list[str]:
    """Read "adaptive,lru". Raises ConfigError, with the nearest name."""
    try:
        return [check_name(name.strip()) for name in text.split(",")]
    except UnknownPolicy as error:
        raise ConfigError(f"--policy {text}: {error}") from None


def capacities(text: str, trace: Trace) -> list[int]:
    """Read "2%,500": shares of the unique blocks, or numbers of blocks, as numbers of blocks."""
    found = []
    for part in text.split(","):
        given = part.strip()
        try:
            number = float(given.removesuffix("%"))
            blocks = int(number * trace.unique / 100 if given.endswith("%") else number)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"--capacity {given}: expected a share of the unique blocks as in 2%, or a number "
                "of blocks"
            ) from None
        longest = int(np.diff(trace.offsets).max(initial=1))
        if blocks < 1:
            raise ConfigError(
                f"--capacity {given} is {blocks} of {trace.unique} unique blocks: expected at "
                f"least 1 block; the longest request has {longest}"
            )
        found.append(blocks)
    return found


def table(
    trace: Trace,
    policies: Sequence[str],
    blocks: Sequence[int],
    scored: float,
) -> list[Point]:
    """Play every policy at every capacity, LRU and the optimum besides.

    scored: the share of the requests, from the end, whose hits count.
    """
    if not 0 < scored <= 1:
        raise ConfigError(f"--scored {scored}: expected a share above 0, up to 1")
    score_from = int(trace.requests * (1 - scored))
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


def svg(points: Sequence[Point], title: str) -> str:
    """Draw hit ratio over capacity (logarithmic), one line a policy."""
    low, high = min(p.share for p in points), max(p.share for p in points)
    top = max(0.01, max(p.hit_ratio for p in points))
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
        text((LEFT + right) / 2, 20, f"{title}: hit ratio by capacity"),
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
        mine = sorted((p.share, p.hit_ratio) for p in points if p.policy == name)
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


def write(trace: Trace, path: Path) -> None:
    """Write a trace as a prefix tree (.npz), or as Mooncake's lines (.jsonl, which know no stop).

    Raises TraceError for another ending, or where the file cannot be written.
    """
    try:
        if path.suffix == ".npz":
            _write_tree(trace, path)
        elif path.suffix == ".jsonl":
            _write_lines(trace, path)
        else:
            raise TraceError(f"{path}: expected a name that ends in .npz or .jsonl")
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write_lines(trace: Trace, path: Path) -> None:
    encoder = msgspec.json.Encoder()
    with path.open("wb") as stream:
        for request in range(trace.requests):
            blocks = trace.path(request).tolist()
            line = {
                "timestamp": round(1000 * float(trace.seconds[request]), 3),
                "input_length": len(blocks) * trace.block_tokens,
                "output_length": max(0, int(trace.output_tokens[request])),
                "hash_ids": blocks,
            }
            stream.write(encoder.encode(line) + b"\n")


def _write_tree(trace: Trace, path: Path) -> None:
    counts = np.diff(trace.offsets)
    firsts = trace.offsets[:-1][counts > 0]
    above = np.concatenate([[-1], trace.nodes[:-1]]).astype(np.int64)[: len(trace.nodes)]
    above[firsts] = -1
    parents = np.full(trace.unique, -1, dtype=np.int64)
    parents[trace.nodes] = above
    leaves = np.full(trace.requests, -1, dtype=np.int32)
    leaves[counts > 0] = trace.nodes[trace.offsets[1:][counts > 0] - 1]
    np.savez_compressed(
        path,
        parent_delta=(np.arange(trace.unique) - 1 - parents).astype(np.int32),
        leaf=leaves,
        nblk=counts.astype(np.int32),
        t_ms=np.rint(1000 * trace.seconds).astype(np.int64),
        in_tok=(counts * trace.block_tokens).astype(np.int64),
        out_tok=trace.output_tokens,
        stop=trace.stops,
        block_tokens=np.array(trace.block_tokens),
    )
