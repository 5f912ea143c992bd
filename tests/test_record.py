"""A recording is a trace of what was asked for, within its bytes."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

import kvengine
import rig
from kvengine import cli, events, formats
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
    assert "name a program after --, or an endpoint" in capfd.readouterr().err
    assert cli.run(["trace", "record", str(path), "--", "no-such-program"]) == cli.BAD_INPUT
    assert "no-such-program: cannot be run" in capfd.readouterr().err


# What vLLM publishes


@pytest.fixture
def publisher() -> Iterator[tuple[zmq.Socket, str]]:
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, f"tcp://127.0.0.1:{port}"
    context.destroy(linger=0)


def publish(socket: zmq.Socket, number: int, payload: object) -> None:
    packed = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
    socket.send_multipart([b"topic", number.to_bytes(8, "big"), packed])


def stored(hashes: list[bytes], parent: bytes | None, **more: object) -> dict[str, object]:
    fields = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent}
    return fields | {"token_ids": [1, 2, 3], "block_size": 16, "medium": "GPU"} | more


def test_events_of_vllm_are_written_without_tokens(publisher, tmp_path):
    """Maps and arrays; what is none, and what does not arrive, is counted."""
    socket, endpoint = publisher
    path = tmp_path / "events.jsonl"
    found: list[events.Heard] = []

    def over(heard: events.Heard) -> None:
        if heard.blocks == 3:
            raise KeyboardInterrupt

    def listen() -> None:
        found.append(events.listen(endpoint, path, rig.WAIT_S, over))

    thread = threading.Thread(target=listen)
    thread.start()
    empty = {"ts": 0.5, "events": [], "data_parallel_rank": 0}
    assert rig.poll(lambda: publish(socket, 0, empty) or path.exists() and path.stat().st_size)
    publish(socket, 1, {"ts": 1.0, "events": [stored([b"a", b"b"], None, extra_keys=[["salt"]])]})
    publish(socket, 2, b"nonsense")
    publish(socket, 3, {"ts": 2.0, "events": [{"type": "BlockRemoved", "block_hashes": [b"a"]}]})
    publish(socket, 9, [9.0, [["BlockStored", [7], b"b", [4], 16, None, "GPU"]], 0])
    thread.join(2 * rig.WAIT_S)
    (heard,) = found
    assert (heard.blocks, heard.malformed, heard.missed) == (3, 1, 5)
    text = path.read_text()
    assert "token_ids" not in text and "salt" not in text and path.stat().st_mode & 0o777 == 0o600
    trace = formats.read(path)
    assert [trace.path(request).tolist() for request in range(2)] == [[0, 1], [0, 1, 2]]


def test_listening_by_command(publisher, tmp_path, capsys):
    _, endpoint = publisher
    command = ["trace", "record", str(tmp_path / "a.jsonl"), "--vllm", endpoint, "--seconds", "0.3"]
    assert cli.run(command) == 0
    assert "0 batches, 0 blocks, 0 missed" in capsys.readouterr().out
    assert cli.run([*command, "--", "a program"]) == cli.BAD_INPUT
    for wrong, says in (
        ({"endpoint": "nowhere"}, "expected where vLLM publishes"),
        ({"to": tmp_path / "no" / "a.jsonl"}, "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=says):
            events.listen(**({"endpoint": endpoint, "to": tmp_path / "a", "seconds": 0.1} | wrong))
