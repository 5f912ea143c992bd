"""`kvengine demo`: a real model's K/V saved, evicted to disk, and reloaded by a second process.

This process loads no framework: it finds the model, starts the two processes one after the other
(demo/steps.py), compares what they report, and shows it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvengine.config import child_environment
from kvengine.demo import model as models
from kvengine.errors import ConfigError, KVEngineError

STEP_S = 3600.0
REUSE_MIN = 0.95
VARIED_MIN = 4
SAID = (
    ("kv_bit_equal", "K/V loaded are bit-equal to K/V saved, in every load"),
    ("tokens_equal", "generated tokens equal those of the uncached run"),
    ("tokens_varied", "those tokens are varied: an error would show"),
    ("prefix_reused", f"at least {REUSE_MIN:.0%} of the prefix's tokens were reused"),
    ("evicted_to_disk", "memory was empty, and the blocks on disk, before the loads from disk"),
    ("second_process_from_disk", "a second process reused the prefix from disk"),
    ("nothing_went_wrong", "no corrupt block, no failed read or write"),
)


def run(*, model: str | None, dtype: str, directory: Path | None, as_json: bool) -> int:
    """Run the demo, show it on stdout; 0, or 1 where a check failed.

    The disk tier is kept in `directory`/demo, or in a temporary directory. Raises ConfigError
    where there is no model, KVEngineError where a process fails.
    """
    start = time.monotonic()
    found = models.find(model)
    with tempfile.TemporaryDirectory(prefix="kvengine-demo-") as work:
        tier = Path(work) if directory is None else directory.absolute()
        job = {"model": found, "dtype": dtype, "work": work, "tier": str(tier / "demo")}
        try:
            (tier / "demo").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--directory {directory} cannot be made ({error.strerror}): name one that this "
                "user may write"
            ) from error
        first = _process(job, Path(work), "first")
        second = _process({**job, "shared": {"pid": first["pid"]}}, Path(work), "second")
    report = judge(first, second)
    report = {"model": Path(found).stem, "dtype": dtype, **report}
    report["seconds"] = time.monotonic() - start
    if as_json:
        print(json.dumps(report))
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 100, highlight=False))
    return 0 if all(report["checks"].values()) else 1


def judge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Compare what the two processes report: the whole result but what names the run."""
    runs = {"memory": first["memory"], "disk": first["disk"], "second": second["answers"]}
    loads = [each for answers in runs.values() for each in answers]
    expected = [each["tokens"] for each in first["cold"]]
    tokens, blocks = first["prefix_tokens"], first["prefix_blocks"]
    reused = sum(each["reused_tokens"] for each in loads)
    fraction = reused / (tokens * len(loads))
    in_second = sum(each["reused_tokens"] for each in runs["second"])
    ttft = {name: _median(answers) for name, answers in {"cold": first["cold"], **runs}.items()}
    faults = [
        stats[name]
        for stats in (first["stats"], second["stats"])
        for name in ("corrupt_blocks", "tier_failures", "save_refused_blocks")
    ]
    return {
        "prompts": len(expected),
        "prefix_tokens": tokens,
        "block_tokens": tokens // blocks,
        "checks": {
            "kv_bit_equal": all(each["kv"] == first["kv"] for each in loads),
            "tokens_equal": all(
                [each["tokens"] for each in answers] == expected for answers in runs.values()
            ),
            "tokens_varied": len({tuple(each) for each in expected}) == len(expected)
            and all(len(set(each)) >= VARIED_MIN for each in expected),
            "prefix_reused": fraction >= REUSE_MIN,
            "evicted_to_disk": first["squeezed"]["memory_blocks"] == 0
            and first["squeezed"]["tier_blocks"] >= blocks
            and first["squeezed"]["evicted_blocks"] >= blocks,
            "second_process_from_disk": second["pid"] != first["pid"]
            and second["before"]["memory_blocks"] == 0
            and second["stats"]["fetched_blocks"] * (tokens // blocks) >= in_second
            and in_second >= REUSE_MIN * tokens * len(expected),
            "nothing_went_wrong": not any(faults),
        },
        "reuse": {"fraction": fraction, "tokens": reused, "of_tokens": tokens * len(loads)},
        "ttft": {
            **{f"{name}_s": value for name, value in ttft.items()},
            "cold_over_warm": ttft["cold"] / ttft["memory"],
            "cold_over_disk": ttft["cold"] / ttft["disk"],
            "cold_over_second": ttft["cold"] / ttft["second"],
        },
        "bytes": {
            "kv": first["kv_bytes"],
            "memory_after_save": first["memory_bytes"],
            "memory_squeezed": first["squeezed"]["memory_bytes"],
            "memory": first["stats"]["memory_bytes"],
            "disk": first["stats"]["tier_bytes"],
        },
        "peak_bytes": max(first["peak_bytes"], second["peak_bytes"]),
        "text": first["text"],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table and a line for each check."""
    tokens, nbytes, ttft = report["prefix_tokens"], report["bytes"], report["ttft"]
    console.print(
        f"{escape(report['model'])}, {report['dtype']}: {report['prompts']} prompts with the same "
        f"{tokens:,} tokens, in blocks of {report['block_tokens']}"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("prefix", "tokens reused", "first token", "faster", "in memory", "on disk"):
        table.add_column(name, justify="left" if name == "prefix" else "right")
    reused = f"{round(report['reuse']['fraction'] * tokens):,}"
    table.add_row("computed", "0", f"{ttft['cold_s']:.3f} s", "", "", "")
    for label, name, ratio, memory, disk in (
        ("from memory", "memory_s", "cold_over_warm", nbytes["memory_after_save"], nbytes["disk"]),
        ("from disk", "disk_s", "cold_over_disk", nbytes["memory_squeezed"], nbytes["disk"]),
        ("second process", "second_s", "cold_over_second", 0, nbytes["disk"]),
    ):
        row = (f"{ttft[name]:.3f} s", f"{ttft[ratio]:.1f} x", _mebibytes(memory), _mebibytes(disk))
        table.add_row(label, reused, *row)
    console.print(table)
    for name, said in SAID:
        mark = "[green]ok[/green]" if report["checks"][name] else "[red]FAILED[/red]"
        console.print(f"{mark}  {said}")
    console.print(f"{report['seconds']:.0f} s, at most {_mebibytes(report['peak_bytes'])}")


def _process(job: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    """Run one step in a process of its own and return its result."""
    result = work / f"{name}.result.json"
    told = work / f"{name}.job.json"
    told.write_text(json.dumps({**job, "result": str(result)}))
    # Threads that wait by spinning keep each other from running where others use the processors:
    # with 11 ready for 2, decoding 16 tokens took 45 s, and 1.5 s with threads that sleep.
    # -P: the working directory may hold a module of a framework's name.
    command = [sys.executable, "-P", "-m", "kvengine.demo.steps", str(told)]
    environ = child_environment(OMP_WAIT_POLICY="passive")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=2, env=environ, timeout=STEP_S
        )
    except subprocess.TimeoutExpired as error:
        raise KVEngineError(f"the {name} process of the demo took over {STEP_S:.0f} s") from error
    if done.returncode or not result.exists():
        raise KVEngineError(
            f"the {name} process of the demo ended with status {done.returncode}: see above"
        )
    found: dict[str, Any] = json.loads(result.read_text())
    if "error" in found:
        raise KVEngineError(found["error"])
    return found


def _median(answers: list[dict[str, Any]]) -> float:
    return float(statistics.median(each["ttft_s"] for each in answers))


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
