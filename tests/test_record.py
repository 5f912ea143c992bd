"""A recording is a trace of what was asked for, within its bytes."""

import sys
from pathlib import Path

import pytest

import kvengine
import rig
from kvengine import cli, formats
from kvengine.errors import ConfigError
from kvengine.policy import Request

OF = rig.layout()


def test_what_is_asked_is_recorded(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    with kvengine.open("mem://?size=1M") as engine:
        names = rig.names(engine, OF)
        engine.record(path)
        for blocks in (3, 5, 2, 0):
            engine.match(names.keys(rig.prompt(blocks, OF))).release()
        request = Request(output_tokens=77)
        engine.match(names.keys(rig.prompt(4, OF, seed=1)), request=request).release()
        engine.match(names.keys(rig.prompt(4, OF))[2:]).release()  # a later part: left out
        engine.record(None)
        engine.match(names.keys(rig.prompt(1, OF))).release()
    read = formats.read(path, OF.block_tokens)
    assert [len(read.path(request)) for request in range(read.requests)] == [3, 5, 2, 0, 4]
    assert read.output_tokens.tolist() == [0, 0, 0, 0, 77]
    assert read.unique == 9 and path.stat().st_mode & 0o777 == 0o600
    assert read.path(1)[:3].tolist() == read.path(0).tolist()


def test_a_recording_that_the_url_names(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    with kvengine.open(f"mem://?size=1M&record={path}") as engine:
        engine.match(rig.names(engine, OF).keys(rig.prompt(3, OF))).release()
    assert formats.read(path, OF.block_tokens).unique == 3
    with pytest.raises(ConfigError, match="cannot be made"):
        kvengine.open(f"mem://?size=1M&record={tmp_path}/no/asked.jsonl")


def test_a_recording_has_a_limit(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    with kvengine.open("mem://?size=1M") as engine:
        keys = rig.names(engine, OF).keys(rig.prompt(5, OF))
        engine.record(path, 2000)
        for _ in range(100):
            engine.match(keys).release()
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 1000
    assert formats.read(path, OF.block_tokens).unique == 5


def test_a_file_that_cannot_be_made_is_said(tmp_path: Path):
    with kvengine.open("mem://?size=1M") as engine:
        with pytest.raises(ConfigError, match="cannot be made"):
            engine.record(tmp_path / "no" / "asked.jsonl")


PROGRAM = """
import sys, kvengine, rig
with kvengine.open("mem://?size=1M") as engine:
    engine.match(rig.names(engine, rig.layout()).keys(rig.prompt(3, rig.layout()))).release()
sys.exit(int(sys.argv[1]))
"""


def test_a_program_is_recorded(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(rig.TESTS))
    path = tmp_path / "asked.jsonl"
    command = ["trace", "record", str(path), "--", sys.executable, "-c", PROGRAM, "7"]
    assert cli.run(command) == 7
    assert formats.read(path, OF.block_tokens).unique == 3
    assert cli.run(["trace", "record", str(path)]) == cli.BAD_INPUT
    assert "no program is given" in capfd.readouterr().err
    assert cli.run(["trace", "record", str(path), "--", "no-such-program"]) == cli.BAD_INPUT
    assert "no-such-program: cannot be run" in capfd.readouterr().err
