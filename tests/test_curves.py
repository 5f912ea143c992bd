"""`kvengine trace`: tables, curves and other formats of small traces; what is said of bad ones."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kvengine import cli, curves, formats, trace

REQUESTS = 200


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mooncake's lines of chats that take turns, and share a prompt."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("traces") / "chat.jsonl"
    chats: list[list[int]] = [[0, 1] for _ in range(20)]
    fresh = 2
    with path.open("w") as stream:
        for number in range(REQUESTS):
            chat = chats[int(draw.zipf(1.5)) % 20]
            chat += range(fresh, fresh + 3)
            fresh += 3
            line = {
                "timestamp": 1000 * number,
                "input_length": 512 * len(chat) + 7,
                "output_length": number,
                "hash_ids": [*chat, 10**9 + number],
            }
            stream.write(json.dumps(line) + "\n")
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.run([str(each) for each in arguments]) == cli.BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_simulate(lines, tmp_path, capsys):
    svg = tmp_path / "curves.svg"
    arguments = ["trace", "simulate", str(lines), "--policy", "s3fifo,lru", "--capacity", "5%,60"]
    assert cli.run([*arguments, "--svg", str(svg), "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [point["policy"] for point in points] == ["lru", "s3fifo", "opt"] * 2
    read = formats.read(lines)
    assert {point["blocks"] for point in points} == {int(read.unique * 0.05), 60}
    for point in points:
        score_from = int(REQUESTS * 0.6)
        if point["policy"] == "opt":
            expected = trace.optimum(read, point["blocks"], score_from)
            assert point["gap_closed"] == 1
        else:
            policy = curves.policy_of(point["policy"])
            expected = trace.simulate(read, policy, point["blocks"], score_from)
        assert point["hit_ratio"] == expected.hit_ratio > 0
    drawn = ElementTree.fromstring(svg.read_text())
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 3
    assert cli.run([*arguments, "--coarsen", "2"]) == 0
    assert "gap closed" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [["a.npz"], ["a.jsonl"], ["a.npz", "b.jsonl", "c.npz"]])
def test_convert_keeps_what_is_played(lines, tmp_path, capsys, steps):
    source, before = lines, formats.read(lines)
    for name in steps:
        assert cli.run(["trace", "convert", str(source), str(tmp_path / name)]) == 0
        source = tmp_path / name
    after = formats.read(source)
    assert after.block_tokens == before.block_tokens and after.unique == before.unique
    np.testing.assert_array_equal(after.offsets, before.offsets)
    np.testing.assert_array_equal(after.seconds, before.seconds)
    np.testing.assert_array_equal(after.output_tokens, before.output_tokens)
    lru = curves.policy_of("lru")
    assert (
        trace.simulate(after, lru, 60).hits
        == trace.simulate(before, curves.policy_of("lru"), 60).hits
    )


def test_bad_input_is_said(lines, tmp_path, capsys):
    said = fails(capsys, "trace", "simulate", lines, "--policy", "adaptve")
    assert "did you mean 'adaptive'" in said
    for capacity in ("0", "0%", "-3%"):
        assert "at least 1 block" in fails(
            capsys, "trace", "simulate", lines, f"--capacity={capacity}"
        )
    for capacity in ("much", "", "nan", "inf"):
        said = fails(capsys, "trace", "simulate", lines, f"--capacity={capacity}")
        assert "expected a share of the unique blocks" in said
    assert "--scored 2.0" in fails(capsys, "trace", "simulate", lines, "--scored", "2")
    assert "cannot be read" in fails(capsys, "trace", "simulate", tmp_path / "none.jsonl")
    assert "cannot be written" in fails(
        capsys, "trace", "simulate", lines, "--capacity", "9", "--svg", tmp_path / "no" / "a.svg"
    )
    assert "ends in .npz or .jsonl" in fails(capsys, "trace", "convert", lines, tmp_path / "a.csv")
    text = lines.read_text().splitlines()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([*text[:4], text[4][:30]]))
    assert f"{cut}, line 5" in fails(capsys, "trace", "simulate", cut)
    cut.write_text("\n".join([text[1], text[0]]))
    said = fails(capsys, "trace", "convert", cut, tmp_path / "a.npz")
    assert f"{cut}, line 2" in said and "goes back by 1.000 s" in said
