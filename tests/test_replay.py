"""A trace against an engine that is there: what was moved was right, and the sums hold."""

import json
from pathlib import Path

import numpy as np
import pytest

import kvengine
from kvengine import cli, formats
from kvengine.costs import MODELS
from kvengine.errors import TraceError
from kvengine.replay import OPS, replay
from kvengine.trace import Trace
from test_daemon import Daemon
from test_trace import drawn

MODEL = MODELS["llama-3-8b"]
SIZE = 4096


def shorter(trace: Trace, by: float) -> Trace:
    return Trace(**(vars(trace) | {"seconds": trace.seconds * by}))


@pytest.mark.parametrize("clients", [1, 3])
def test_all_that_was_there_is_loaded(clients):
    trace = drawn(150, 7)
    told: list[int] = []
    with kvengine.open("mem://?size=64M&shadow=lru") as engine:
        engine.warm()
        found = replay(
            engine, trace, MODEL, block_bytes=SIZE, clients=clients, progress=told.append
        )
        shadows = engine.shadows()
        engine.check()
    assert sorted(told) == list(range(1, 151)) and found.requests == 150
    assert (found.lookup_blocks, found.wrong_blocks, found.failed_blocks) == (
        len(trace.nodes),
        0,
        0,
    )
    assert found.prefill_s > 0 and found.moved_bytes == SIZE * (
        found.loaded_blocks + found.saved_blocks
    )
    if clients == 1:
        assert found.saved_blocks == trace.unique
        assert found.hit_blocks == found.loaded_blocks == len(trace.nodes) - trace.unique
        assert shadows["lru"].hit_blocks == found.hit_blocks
    assert set(found.latency) == set(OPS) and found.latency["match"].count == 150
    for each in found.latency.values():
        assert 0 < each.p50 <= each.p90 <= each.p99 <= each.most


def test_little_memory_and_a_disk(tmp_path):
    """Blocks come back from below, in tables of their own; none is another's."""
    trace = drawn(150, 8)
    with kvengine.open(f"mem://?size=1M | file://{tmp_path}/kv?size=64M") as engine:
        engine.warm()
        found = replay(engine, trace, MODEL, block_bytes=SIZE)
        fetched = engine.stats()["fetched_blocks"]
    assert fetched > 0 and found.wrong_blocks == 0
    assert found.loaded_blocks + found.failed_blocks <= found.hit_blocks


def test_a_prompt_of_several_tables():
    path = np.arange(600, dtype=np.int32)
    trace = Trace(
        "long", 16, np.tile(path, 2), np.array([0, 600, 1200]), np.zeros(2),
        np.zeros(2, np.int32), np.zeros(2, np.int32), np.arange(600),
    )  # fmt: skip
    with kvengine.open("mem://?size=16M") as engine:
        found = replay(engine, trace, MODEL, block_bytes=SIZE)
    assert (found.saved_blocks, found.loaded_blocks, found.wrong_blocks) == (600, 600, 0)


def test_times_are_kept():
    trace = shorter(drawn(6, 9), 0.02)
    span = float(trace.seconds[-1] - trace.seconds[0])
    with kvengine.open("mem://?size=16M") as engine:
        found = replay(engine, trace, MODEL, block_bytes=SIZE, speed=2.0)
    assert found.took_s >= span / 2 and found.late_s < found.took_s


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"block_bytes": 4}, "block_bytes: given 4"),
        ({"speed": -1.0}, "speed: given -1"),
        ({"clients": 0}, "clients: given 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with kvengine.open("mem://?size=1M") as engine:
        with pytest.raises(TraceError, match=says):
            replay(engine, drawn(3), MODEL, **wrong)


def test_an_error_of_a_client_ends_the_replay():
    with kvengine.open("mem://?size=1M") as engine:

        def progress(done: int) -> None:
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            replay(engine, drawn(50), MODEL, block_bytes=SIZE, clients=2, progress=progress)


def test_command(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    formats.write(drawn(40, 3), path)
    url = "mem://?size=16M&shadow=arc"
    arguments = ["trace", "replay", str(path), url, "--block-tokens", "16"]
    assert cli.run([*arguments, "--block-size", "4K", "--requests", "30", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["requests"] == 30 and facts["wrong_blocks"] == 0
    assert set(facts["shadows"]) == {"live", "arc"} and facts["latency"]["save"]["p99"] > 0
    assert cli.run(arguments) == 0
    assert "latency match" in capsys.readouterr().out
    for wrong, says in (
        (["--model", "llama-3"], "--model llama-3: did you mean 'llama-3-8b'"),
        (["--block-size", "much"], "--block-size much: expected bytes"),
    ):
        assert cli.run([*arguments, *wrong]) == cli.BAD_INPUT
        assert says in capsys.readouterr().err


def test_a_daemon_is_played_against_and_says_what_it_saw(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    formats.write(drawn(60, 3), path)
    daemon = Daemon(tmp_path, "mem://?size=16M&shadow=arc")
    try:
        arguments = ["trace", "replay", str(path), daemon.url, "--block-tokens", "16"]
        assert cli.run([*arguments, "--block-size", "4K", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["wrong_blocks"] == 0 < facts["loaded_blocks"] == facts["hit_blocks"]
        assert cli.run(["stats", daemon.url, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["saved_blocks"] == facts["saved_blocks"]
        assert found["shadow_arc_hit_blocks"] == found["shadow_live_hit_blocks"]
        assert found["shadows"]["arc"] == pytest.approx(facts["hit_ratio"])
        assert cli.run(["stats", daemon.url]) == 0
        assert "shadow_arc_hit_ratio" in capsys.readouterr().out
    finally:
        assert daemon.stop() == 0
    assert cli.run(["stats", "mem://?size=1M"]) == cli.BAD_INPUT
    assert "expected unix:///PATH of a daemon" in capsys.readouterr().err


def test_simulate_with_tiers(tmp_path, capsys):
    path, svg = tmp_path / "a.jsonl", tmp_path / "a.svg"
    formats.write(drawn(200, 3), path)
    arguments = ["trace", "simulate", str(path), "--block-tokens", "16", "--capacity", "5%,20%"]
    tiers = ["--tiers", "nvme=20%,s3=100%", "--model", "deepseek-v3", "--svg", str(svg)]
    assert cli.run([*arguments, *tiers, "--policy", "arc", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [point["policy"] for point in points] == ["lru", "arc"] * 2
    for point in points:
        assert 0 < point["memory_ratio"] < point["hit_ratio"] and point["saved_share"] > 0
    assert "share of prefill saved" in Path(svg).read_text()
    assert cli.run([*arguments, *tiers]) == 0
    assert "prefill saved" in capsys.readouterr().out
    for wrong, says in (
        (["--tiers", "nvm=20%"], "--tiers nvm: did you mean 'nvme'"),
        (["--tiers", "nvme"], "--tiers nvme : expected a share"),
        (["--tiers", "nvme=0"], "--tiers nvme 0 is 0 of"),
        (["--model", "gpt"], "--model gpt: expected one of llama-3-8b"),
    ):
        assert cli.run([*arguments, *wrong]) == cli.BAD_INPUT
        assert says in capsys.readouterr().err
