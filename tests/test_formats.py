"""kvengine.formats: read what others write down, say what is not as expected, write it again."""

import json
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvengine.errors import TraceError
from kvengine.formats import read
from kvengine.policy import STOP_END, STOP_TOOL, UNKNOWN_STOP
from kvengine.trace import Trace


def line(**changes: object) -> str:
    fields = {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]}
    return json.dumps(fields | changes)


@pytest.fixture
def write(tmp_path):
    def write(*lines: str) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(lines))
        return path

    return write


def paths(trace: Trace) -> list[list[int]]:
    return [trace.path(request).tolist() for request in range(trace.requests)]


def test_mooncake(write):
    trace = read(write(line(), line(timestamp=1500, hash_ids=[1, 2, 9], input_length=1536)))
    assert (trace.requests, trace.unique, trace.block_tokens) == (2, 3, 512)
    assert trace.path(0).tolist() == [0, 1]  # the third block is not full
    assert trace.path(1).tolist() == [0, 1, 2]
    assert trace.seconds.tolist() == [0.0, 1.5] and trace.output_tokens.tolist() == [7, 7]


def test_bailian(write):
    made = [
        line(chat_id=1, parent_chat_id=-1, timestamp=2.5, input_length=33, turn=1, type="text"),
        line(chat_id=2, parent_chat_id=1, timestamp=4.0, input_length=48, turn=2, type="text"),
    ]
    trace = read(write(*made))
    assert (trace.unique, trace.block_tokens) == (3, 16)
    assert trace.seconds.tolist() == [2.5, 4.0]


def test_a_hash_after_another_prefix_is_another_block(write):
    trace = read(write(line(hash_ids=[1, 5, 0]), line(hash_ids=[2, 5, 0])))
    assert trace.unique == 4


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line(), '{"timestamp": 3, "inp'], "line 2: .*expected one JSON object a line"),
        ([line(), "[]"], "line 2: .*expected one JSON object a line"),
        ([line(hash_ids="x")], "line 1: .*hash_ids"),
        ([line(timestamp=5), "", line(timestamp=4)], "line 3: its time goes back by 0.001 s"),
        (
            [line(timestamp=-1)],
            "line 1: its time is -0.001: expected a number of seconds from 0 on",
        ),
        ([line(hash_ids=[1])], "line 1: 1 hash_ids for 1100 tokens: expected at least 2 of 512"),
        ([line(output_length=-4)], "line 1: input_length and output_length: expected 0 to"),
        ([], "no requests"),
    ],
)
def test_malformed_lines(write, lines, says):
    with pytest.raises(TraceError, match=says):
        read(write(*lines))


def columns(**changes: object) -> dict[str, object]:
    return {
        "parent_delta": np.array([0, 0, 1]),  # 0 ← 1, 0 ← 2
        "leaf": np.array([1, 2, -1]),
        "nblk": np.array([2, 2, 0]),
        "t_ms": np.array([0, 1000, 2000]),
        "out_tok": np.array([1, 2, 3]),
        "stop": np.array([0, 1, 2]),
        "block_tokens": np.int64(64),
    } | changes


def test_tree(tmp_path):
    path = tmp_path / "tree.npz"
    np.savez(path, **columns())
    trace = read(path)
    assert [trace.path(r).tolist() for r in range(3)] == [[0, 1], [0, 2], []]
    assert trace.coarsened(2).block_tokens == 128 and trace.coarsened(2).unique == 2
    assert trace.coarsened(3).unique == 0
    assert trace.first(1).unique == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"t_ms": np.array([0, 9, 8])}, "request 2: its time goes back"),
        ({"leaf": np.array([1, 3, -1])}, "points outside the tree"),
        ({"parent_delta": np.array([0, 0, 9])}, "points outside the tree"),
        ({"nblk": np.array([2, 1, 0])}, "request 1: nblk is not the depth"),
        ({"nblk": np.array([2, 3, 0])}, "request 1: nblk is not the depth"),
        ({"nblk": np.array([2, 2])}, "expected equal lengths"),
    ],
)
def test_malformed_tree(tmp_path, changes, says):
    np.savez(tmp_path / "tree.npz", **columns(**changes))
    with pytest.raises(TraceError, match=says):
        read(tmp_path / "tree.npz")


def test_no_tree(tmp_path):
    np.savez(tmp_path / "a.npz", leaf=np.zeros(1))
    with pytest.raises(TraceError, match="no column 'parent_delta'"):
        read(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="not a whole .npz file"):
        read(tmp_path / "a.npz")
    with pytest.raises(TraceError, match="cannot be read"):
        read(tmp_path / "nowhere.jsonl")


# LMCache


def lookup(**changes: object) -> str:
    fields = {"timestamp": 1711929600.5, "request_id": "a", "chunk_size": 256, "seq_len": 1024}
    return json.dumps(fields | {"chunk_hashes": ["0xab", "0xcd"]} | changes)


def test_lmcache_lookups(write):
    later = lookup(timestamp=1711929602.0, chunk_hashes=["0xab", "0xef", "0xcd"])
    trace = read(write(lookup(), later))
    assert paths(trace) == [[0, 1], [0, 2, 3]] and trace.block_tokens == 256
    assert np.diff(trace.seconds).tolist() == [1.5]


def key(number: int, rank: int = 0) -> dict[str, object]:
    inner = {"chunk_hash": bytes([number]) * 32, "model_name": "m", "kv_rank": rank}
    return {"__t__": "ObjectKey", "v": inner}


HEADER = {"type": "header", "magic": b"LMCT", "format_version": 1, "level": "storage"}


def call(seconds: float, *keys: object, verb: str = "submit_prefetch_task", spec: bool = False):
    args: dict[str, object] = {"keys": list(keys)}
    if spec:
        args = {"spec": {"__t__": "PrefetchRequestSpec", "v": args}, "external_request_id": "r"}
    name = f"lmcache.v1.distributed.storage_manager.StorageManager.{verb}"
    return {"type": "record", "t_mono": seconds, "t_wall": 0.0, "qualname": name, "args": args}


def calls(path: Path, *frames: object) -> Path:
    packed = [msgspec.msgpack.encode(frame) for frame in frames]
    path.write_bytes(b"".join(struct.pack(">I", len(data)) + data for data in packed))
    return path


def test_lmcache_calls(tmp_path):
    """Look-ups alone, as both versions write them; a key for each rank is one block."""
    path = calls(
        tmp_path / "a.lct",
        HEADER,
        call(0.5, key(1), key(1, 1), key(2), key(2, 1)),
        call(0.6, key(1), verb="reserve_write"),
        call(0.7, key(1), key(3), spec=True),
    )
    trace = read(path)
    assert paths(trace) == [[0, 1], [0, 2]] and trace.block_tokens == 256
    assert trace.seconds.tolist() == [0.5, 0.7] and read(path, 128).block_tokens == 128


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([HEADER | {"magic": b"LMCX"}], "frame 1 at byte 0: expected a header of LMCache's trace"),
        ([HEADER | {"format_version": 2}], "frame 1 .*format 1"),
        ([HEADER, 7], "frame 2 at byte .*expected a frame"),
        ([HEADER], "no requests"),
        ([HEADER, call(0.0, {"v": 3})], "frame 2 .*a look-up without keys"),
        ([HEADER, call(2.0, key(1)), call(1.0, key(1))], "frame 3 .*goes back by 1.000 s"),
    ],
)
def test_malformed_calls(tmp_path, frames, says):
    with pytest.raises(TraceError, match=says):
        read(calls(tmp_path / "a.lct", *frames))


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_calls_that_are_cut_off(tmp_path, cut):
    path = calls(tmp_path / "a.lct", HEADER, call(0.0, key(1)))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(TraceError, match="cut off in the frame at byte .* expected whole frames"):
        read(path)


# vLLM


def stored(hashes, parent=None, **changes: object) -> dict[str, object]:
    fields = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent}
    fields |= {"token_ids": [0] * 16 * len(hashes), "block_size": 16}
    return fields | {"lora_id": None, "medium": "GPU", "lora_name": None} | changes


def batch(seconds: float, *events: object) -> str:
    return json.dumps({"ts": seconds, "events": events, "data_parallel_rank": 0})


def test_vllm_events(write):
    """Steps of one request are joined; a later turn, or a branch, is another."""
    trace = read(
        write(
            batch(100.0, stored(["a", "b"]), stored(["x"], medium="CPU")),
            batch(100.5, stored(["c"], "b"), {"type": "BlockRemoved", "block_hashes": ["q"]}),
            batch(101.0, stored(["d"], "a"), {"type": "AllBlocksCleared"}),
            batch(109.0, stored(["e"], "c"), stored(["f"], "b", group_idx=1)),
            batch(109.5, stored(["g"], "unheard-of")),
        )
    )
    assert paths(trace) == [[0, 1, 2], [0, 3], [0, 1, 2, 4], [5, 6]]
    assert trace.seconds.tolist() == [100.0, 101.0, 109.0, 109.5] and trace.block_tokens == 16


def test_vllm_events_as_arrays(write):
    """As versions before 0.11 send them, and hashes that are numbers."""
    rows = [
        [1.0, [["BlockStored", [11, 12], None, [0] * 32, 16, None, "GPU"]], 0],
        [2.5, [["BlockStored", [13], 12, [0] * 16, 16, None], ["BlockRemoved", [11], "GPU"]]],
        [9.0, [["BlockStored", [14], 11, [0] * 16, 16, None], ["AllBlocksCleared"]]],
    ]
    trace = read(write(*map(json.dumps, rows)))
    assert paths(trace) == [[0, 1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([batch(1.0, {"type": "BlockStore"})], "line 1: an event of type 'BlockStore'"),
        ([batch(1.0, stored("abc"))], "line 1: Expected `array`"),
        ([batch(1.0, 4)], "line 1: an event of type None"),
        ([batch(2.0), batch(1.0)], "line 2: ts 1.0 goes back by 1.000 s"),
        ([batch(2.0, stored(["a"])), "[3.0]"], "line 2: .*expected one JSON object a line"),
        ([batch(2.0, stored(["a"])), batch(2.1)[:-9]], "line 2: .*expected one JSON object"),
        ([batch(1.0, stored(["a"])), batch(1.0, stored(["b"], block_size=8))], "block_size is 8"),
        ([batch(1.0, stored(["a"], "b"), stored(["b"], "a")), batch(9.0, stored(["c"], "b"))],
         "line 2: a block comes before itself"),
    ],
)  # fmt: skip
def test_malformed_events(write, lines, says):
    with pytest.raises(TraceError, match=says):
        read(write(*lines))


# kv-cache-tester


def turn(at: float, hashes: list[int], **changes: object) -> dict[str, object]:
    fields = {"t": at, "type": "n", "model": "m", "in": 64 * len(hashes) + 5, "out": 9}
    return fields | {"hash_ids": [*hashes, 99], "stop": "tool_use"} | changes


def session(path: Path, *turns: object, **changes: object) -> Path:
    fields = {"id": path.stem, "models": ["m"], "block_size": 64, "tool_tokens": 130}
    path.write_text(json.dumps(fields | {"requests": turns} | changes))
    return path


def test_sessions(tmp_path):
    """Two blocks of tools are shared; agents run within their parent, requests in order of time."""
    agent = {"t": 1.0, "type": "subagent", "agent_id": "x", "tool_tokens": 64}
    agent["requests"] = [turn(0.5, [7, 8], model="small"), turn(20.0, [7, 8, 9], model="small")]
    session(
        tmp_path / "a.json",
        turn(0.0, [1, 2, 3]),
        agent,
        turn(5.0, [1, 2, 3, 4], stop="end_turn"),
        turn(30.0, [1, 2, 3], model="other", stop=""),
    )
    one = read(tmp_path / "a.json")
    assert paths(one) == [[0, 1, 2], [3, 4], [0, 1, 2, 5], [3, 4, 6], [7, 8, 9]]
    assert one.seconds.tolist() == [0.0, 1.5, 5.0, 21.0, 30.0]
    tool, end = STOP_TOOL, STOP_END
    assert one.stops.tolist() == [tool, tool, end, tool, UNKNOWN_STOP]
    session(tmp_path / "b.json", turn(0.0, [1, 2, 3]))
    both = read(tmp_path, window_s=1000.0)
    assert (both.requests, both.unique, both.block_tokens) == (6, 11, 64)
    assert np.ptp(read(tmp_path).seconds) == 30.0 < np.ptp(both.seconds)


@pytest.mark.parametrize(
    ("turns", "changes", "says"),
    [
        ([turn(0.0, [1], **{"in": 640})], {}, "request 0: 2 hash_ids for 640 tokens"),
        ([turn(0.0, [1], **{"in": -640})], {}, "request 0: 2 hash_ids for -640 tokens"),
        ([turn(0.0, [1], t="x")], {}, r"Expected `float`.* `\$.requests\[0\].t`.*a session of"),
        ([turn(-1.0, [1])], {}, "request 0: its time is -1.0"),
        ([turn(0.0, [1])], {"block_size": 0}, "block_size is 0"),
        ([], {}, "no requests"),
    ],
)
def test_malformed_sessions(tmp_path, turns, changes, says):
    with pytest.raises(TraceError, match=says):
        read(session(tmp_path / "a.json", *turns, **changes))


def test_sessions_that_are_not_there(tmp_path):
    with pytest.raises(TraceError, match="no .json file in it"):
        read(tmp_path)
    session(tmp_path / "a.json", turn(0.0, [1]))
    session(tmp_path / "b.json", turn(0.0, [1]), block_size=32)
    with pytest.raises(TraceError, match="b.json: block_size is 32, expected 64"):
        read(tmp_path)
    (tmp_path / "b.json").write_text('{"id": "b", "block')
    with pytest.raises(TraceError, match="b.json: .*expected a session of kv-cache-tester"):
        read(tmp_path)
    with pytest.raises(TraceError, match="window: given -1"):
        read(tmp_path, window_s=-1)


def test_progress_is_told_of_bytes(write):
    told: list[tuple[int, int]] = []
    path = write(*[line(timestamp=at) for at in range(600)])
    read(path, progress=lambda done, size: told.append((done, size)))
    assert len(told) == 2 and told[0][0] < told[1][0] < told[1][1] == path.stat().st_size


@pytest.mark.parametrize("tokens", [0, -5, 1 << 30])
def test_tokens_of_a_block(write, tokens):
    with pytest.raises(TraceError, match=f"block_tokens: given {tokens}"):
        read(write(line()), tokens)
