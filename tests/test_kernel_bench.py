"""bench.kernels: every path of it, on shapes so small that the interpreter can stand in for a GPU.

Run as a program it does the GPU's part: the interpreter must be chosen before the kernels are
imported, so that part has a process of its own.
"""

import csv
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import gpu

ROOT = Path(__file__).resolve().parent.parent
KIB = 1 << 10


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench.kernels, which is no part of the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.kernels

    return bench.kernels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


def shapes(bench: ModuleType) -> list:
    return [
        bench.Shape("pair", 2, 2, (16, 16), 4),
        bench.Shape("latent", 3, 1, (72,), 5),
        bench.Shape("slots", 2, 2, (16, 16), 4, slots=True),
        bench.Shape("coded", 1, 1, (64, 64), 8),
    ]


def measured(bench: ModuleType, place: object) -> tuple[list, list]:
    rows, points = [], []
    for found, drawn in bench.measured(place, shapes(bench), 9):
        rows += found
        points += drawn
    return rows, points


def check(rows: list, name: str, roof: str, rounds: int = 9) -> None:
    """A share and a speed for each shape and operation, all of them as the reference has it."""
    cases = [row.case for row in rows[::2]]
    for verb in ("encode", "decode"):
        assert f"{name} lossless {verb} coded/8" in cases
        assert f"{name} lossless {verb} pair/4" not in cases  # it would not get smaller
        for scheme in ("int8", "fp8", "int4", "rot4"):
            assert f"{name} {scheme} {verb} pair/4" in cases
        assert f"{name} int8 {verb} latent/5" in cases
        assert f"{name} rot4 {verb} latent/5" not in cases  # rows of 72 have no rotation
    verbs = ["gather raw", "scatter raw", "digest xxh3", "digest blake3"]
    if name == "gpu":
        verbs += ["gather digested", "scatter verified"]
    for shape in ("pair/4", "latent/5", "slots/4 slots", "coded/8"):
        assert {f"{name} {verb} {shape}" for verb in verbs} <= set(cases)
    assert {f"{name} {verb} raw pair/4" for verb in ("relayout", "split", "merge")} <= set(cases)
    assert len(cases) == len(set(cases))
    assert [row.metric for row in rows] == [f"share_of_{roof}", "speed"] * len(cases)
    assert all(row.matches_reference and row.n == rounds and row.value > 0 for row in rows)


def test_a_core_is_measured_against_memcpy(bench: ModuleType) -> None:
    place = bench.Host(4 * KIB, 64 * KIB)
    check(measured(bench, place)[0], "cpu", "memcpy")
    check_others(bench, [place])


def check_others(bench: ModuleType, places: list) -> None:
    """Swaps of each place, and every pair of those who save and verify, all of them right."""
    for place in places:
        rows, _ = bench.swaps(place, (KIB,), 9)
        assert [row.case for row in rows] == [f"{place.name} swap pages 1 KiB"] * 2
        assert all(row.matches_reference for row in rows)
    rows = bench.pairs(places, shapes(bench)[0], 9)
    assert [row.case for row in rows[::2]] == [
        f"saved by {saver.name}, verified by {verifier.name}"
        for saver in places
        for verifier in places
    ]
    assert all(row.matches_reference and row.value > 0 for row in rows)


@pytest.mark.parametrize("verb", ["gather", "scatter"])
def test_bytes_that_went_wrong_are_seen(
    bench: ModuleType, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bench.Host(4 * KIB, 64 * KIB)
    whole = getattr(place, verb)

    def short(moves, digests):
        """Leave out the end of the last component's runs: its last byte may be right by chance."""
        moves.components[-1, bench.copy.RUN] -= 8
        try:
            return whole(moves, digests)
        finally:
            moves.components[-1, bench.copy.RUN] += 8

    monkeypatch.setattr(place, verb, short)
    rows, _ = measured(bench, place)
    found = {row.matches_reference for row in rows if f"cpu {verb}" in row.case}
    assert found == {False}


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_codes_that_went_wrong_are_seen(
    bench: ModuleType, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = bench.Host(4 * KIB, 64 * KIB)
    whole = place.code

    def short(coding, asked, rows, digests, verdicts):
        """Leave out the last layer."""
        if asked != verb:
            return whole(coding, asked, rows, digests, verdicts)
        (blocks, (first, last)) = bench.everything(rows)
        getattr(coding, verb)(rows, blocks, (first, last - 1), digests, verdicts)
        verdicts[:] = bench.copy.GOOD
        return verdicts

    monkeypatch.setattr(place, "code", short)
    rows, _ = measured(bench, place)
    for coding in bench.CODINGS:
        said = f"cpu {coding.name} {verb}"
        assert {row.matches_reference for row in rows if said in row.case} == {False}, said


def test_a_gpu_is_measured_against_its_own_copy(
    require: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("torch")
    require("triton")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    gpu.run(__file__)


def test_the_compile_table_has_the_rows_that_the_goals_name(
    bench: ModuleType,
    cache: None,
    require: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("torch")
    require("triton")
    variants = require("kvengine.kernels.variants")
    first = next(
        each
        for each in variants.VARIANTS
        if each.load_bits == each.store_bits == 128 and each.elements
    )
    monkeypatch.setattr(variants, "VARIANTS", (first,))
    values = {(row.case, row.metric): row.value for row in bench.compiled()}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        case = f"compile {target}"
        for metric in ("spills", "local_bytes", "narrow"):
            assert values[case, metric] == 0
        assert values[case, "count"] == 1
        named = f"{case} {first.name}"
        assert values[named, "load_bits"] == values[named, "store_bits"] == 128
        assert values[named, "registers"] == values[case, "registers"] > 0
        assert values[named, "instructions_per_element"] > 1


@pytest.mark.leaks("matplotlib keeps the fonts open that it has used")
def test_the_plot_has_a_panel_and_a_roof_a_place(
    bench: ModuleType, tmp_path: Path, require: Callable[[str], ModuleType]
) -> None:
    require("matplotlib")
    point = bench.Point("cpu", "cpu gather raw", 4.0, 5e9, 40e9)
    other = bench.Point("gpu", "gpu scatter raw x/16", 4.0, 5e11, 3e12)
    bench.draw([point, other], tmp_path / "a.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    text = (tmp_path / "a.svg").read_text()
    for said in ("gather raw", "scatter raw", "copy roof 40.0 GB/s", "copy roof 3000.0 GB/s"):
        assert f"<!-- {said} -->" in text


def test_an_unknown_part_is_named() -> None:
    command = [sys.executable, "-m", "bench", "kernels", "--parts", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected some of cpu,compile,gpu" in done.stderr


def test_the_table_has_a_line_a_variant(bench: ModuleType, tmp_path: Path) -> None:
    import rich.console

    from bench import runner

    def row(target: str, name: str, metric: str, value: float) -> runner.Row:
        return bench.only(f"compile {target}{name}", metric, "count", value)

    rows = [
        row("sm_80", "", "registers", 40),
        row("sm_80", "", "spills", 0),
        row("sm_80", "", "narrow", 1),
        row("sm_80", " gather of x", "registers", 40),
        row("sm_80", " gather of x", "spills", 0),
        row("sm_80", " gather of x", "load_bits", 128),
        row("sm_80", " gather of x", "store_bits", 64),
    ]
    console = rich.console.Console(width=160, record=True, file=(tmp_path / "x").open("w"))
    bench.show(rows, console)
    console.file.close()
    text = console.export_text()
    assert "40 · 0 · 1 narrow" in text
    assert "gather of x" in text and "40 · 0 · 128/64 · loop" in text and "refused" in text
    runner.write_csv(rows, tmp_path / "rows.csv")
    assert len(list(csv.DictReader((tmp_path / "rows.csv").open()))) == 7


def on_device() -> None:
    import bench.kernels
    from bench import runner

    if gpu.device() == "cpu":  # once each: the interpreter takes seconds for a hash
        runner.ROUNDS_MIN = 1
        bench.kernels.interleave = lambda turns, rounds, warmup=0: runner.interleave(turns, 1, 0)
    place = bench.kernels.Device(gpu.device(), 2 * KIB, 32 * KIB)
    check(measured(bench.kernels, place)[0], "gpu", "copy", 1 if gpu.device() == "cpu" else 9)
    check_others(bench.kernels, [bench.kernels.Host(2 * KIB, 32 * KIB), place])


if __name__ == "__main__":
    on_device()
