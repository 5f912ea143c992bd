"""Files of traces: what others write down of their requests, read as one kind of `Trace`.

    trace = read("conversation_trace.jsonl")
    write(trace, Path("conversation.npz"))

A file is told by what is in it:

- `.npz`: a prefix tree and paths in it (`parent_delta`, `leaf`, `nblk`, `t_ms`, `out_tok`, `stop`,
  `block_tokens`; `in_tok` is written, not read).
- JSON lines, one request each: Mooncake's (`timestamp` in ms, `hash_ids` of 512 tokens; what
  `engine.record` writes), Qwen-Bailian's (`chat_id`, `timestamp` in s, `hash_ids` of 16 tokens),
  LMCache's log of look-ups (`lookup_hashes_*.jsonl`: `timestamp` in s, `chunk_size`,
  `chunk_hashes`).
- JSON lines of vLLM's KV events, one batch each, as `kvengine.events` or another subscriber of its
  ZeroMQ topic writes them (an object with `ts` and `events`, or the arrays of versions before).
  Events tell of blocks stored alone: what continues a block stored less than JOIN_S ago is the same
  request, all else is a new one, of the path from its root.
- LMCache's storage trace (`.lct`: frames of msgpack behind their lengths): each look-up is a
  request; the size of a chunk stands nowhere, so it is 256 tokens unless it is given.
- kv-cache-tester's sessions (a `.json` file each, or a folder of them): hashes are a session's own,
  but tools are shared by sessions of one model and as many tokens of tools. A session says when it
  was within itself alone: starts are drawn over `window_s`.
"""

from __future__ import annotations

import struct
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.errors import TraceError
from kvengine.policy import STOP_END, STOP_TOOL, UNKNOWN_STOP
from kvengine.trace import BLOCKS_MAX, Trace, prints_of

MOONCAKE_TOKENS, BAILIAN_TOKENS, LMCACHE_TOKENS, VLLM_TOKENS = 512, 16, 256, 16
TOKENS_MAX = 1 << 30
FRAME_BYTES_MAX = 1 << 30
JOIN_S = 2.0  # a prompt is computed, and an answer given, in steps that are shorter
TELL_EVERY = 256  # lines, from one call of `progress` to the next
KNOWN = (
    "expected one JSON object a line: requests of Mooncake or Qwen-Bailian (timestamp, "
    "input_length, output_length, hash_ids), look-ups of LMCache (timestamp, chunk_size, "
    "chunk_hashes) or batches of vLLM's KV events (ts, events)"
)

Name = int | str | bytes | tuple[str, str, int, int]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Paths:
    """Requests as they are read: paths of named blocks become paths in a prefix tree."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Name], int] = {}
        self._nodes, self._offsets = array("i"), array("q", [0])
        self._seconds, self._outputs, self._stops = array("d"), array("i"), array("i")

    def add(
        self,
        where: str,
        now: float,
        names: Iterable[Name],
        output_tokens: int = -1,
        stop: int = UNKNOWN_STOP,
    ) -> None:
        """Take in a request, by the names of its blocks. Raises TraceError, with `where`."""
        if not 0 <= now < 1e12:
            raise TraceError(f"{where}: its time is {now}: expected a number of seconds from 0 on")
        if self._seconds and now < self._seconds[-1]:
            raise TraceError(
                f"{where}: its time goes back by {self._seconds[-1] - now:.3f} s: "
                "expected requests in order of time; sort the file"
            )
        parent, known, nodes = -1, self._known, self._nodes
        for name in names:
            parent = known.setdefault((parent, name), len(known))
            nodes.append(parent)
        if len(nodes) > BLOCKS_MAX:
            raise TraceError(f"{where}: more than {BLOCKS_MAX} blocks: give a part of the trace")
        self._offsets.append(len(nodes))
        self._seconds.append(now)
        self._outputs.append(output_tokens)
        self._stops.append(stop)

    def trace(self, path: Path, block_tokens: int) -> Trace:
        """Return what was read. Raises TraceError where that is nothing."""
        if not self._seconds:
            raise TraceError(f"{path}: no requests; {KNOWN}")
        return Trace(
            path.stem, block_tokens, np.array(self._nodes, np.int32),
            np.array(self._offsets, np.int64), np.array(self._seconds, np.float64),
            np.array(self._outputs, np.int32), np.array(self._stops, np.int32),
            prints_of(len(self._known)),
        )  # fmt: skip


def read(
    path: str | Path,
    block_tokens: int | None = None,
    *,
    window_s: float = 0.0,
    progress: Progress | None = None,
) -> Trace:
    """Read a trace, in one pass over its file.

    block_tokens: what one hash covers, where the file does not say and it is not the usual;
    window_s: see the module. Raises TraceError: the file, the line, what was expected.
    """
    path = Path(path)
    if block_tokens is not None and not 0 < block_tokens < TOKENS_MAX:
        raise TraceError(f"block_tokens: given {block_tokens}, expected a number from 1 on")
    try:
        if path.is_dir() or path.suffix == ".json":
            return _read_sessions(path, window_s, progress)
        if path.suffix == ".npz":
            return _read_tree(path)
        with path.open("rb") as stream:
            size = path.stat().st_size
            if path.suffix == ".lct":
                return _read_calls(path, stream, size, block_tokens, progress)
            return _read_lines(path, stream, size, block_tokens, progress)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None


# Lines of JSON


class _Request(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    chat_id: int | str | None = None


class _Lookup(msgspec.Struct):
    timestamp: float
    chunk_size: int
    chunk_hashes: list[str]


class _Batch(msgspec.Struct):
    ts: float
    events: list[object]


class _Kind(msgspec.Struct):
    """Which fields a line has: UNSET for those that it has not."""

    hash_ids: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    chunk_hashes: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    events: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _read_lines(
    path: Path,
    stream: BinaryIO,
    size: int,
    block_tokens: int | None,
    progress: Progress | None,
) -> Trace:
    lines = _lines(path, stream, size, progress)
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{path}: no requests; {KNOWN}")
    where, text = first
    whole = _chained(first, lines)
    if text.lstrip()[:1] == b"[":
        return _read_events(path, whole, block_tokens)
    try:
        kind = msgspec.json.decode(text, type=_Kind)
    except msgspec.DecodeError as error:
        raise TraceError(f"{where}: {error}; {KNOWN}") from None
    if kind.events is not msgspec.UNSET:
        return _read_events(path, whole, block_tokens)
    if kind.chunk_hashes is not msgspec.UNSET:
        return _read_lookups(path, whole)
    return _read_requests(path, whole, block_tokens)


def _lines(
    path: Path, stream: BinaryIO, size: int, progress: Progress | None
) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that are not empty, and where each stands."""
    done = 0
    for number, text in enumerate(stream, 1):
        done += len(text)
        if progress is not None and number % TELL_EVERY == 0:
            progress(done, size)
        if text.strip():
            yield f"{path}, line {number}", text


def _chained(
    first: tuple[str, bytes], lines: Iterator[tuple[str, bytes]]
) -> Iterator[tuple[str, bytes]]:
    yield first
    yield from lines


def _read_requests(
    path: Path, lines: Iterable[tuple[str, bytes]], block_tokens: int | None
) -> Trace:
    decoder = msgspec.json.Decoder(_Request)
    paths, unit, tokens = Paths(), 0.0, block_tokens or 0
    for where, text in lines:
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"{where}: {error}; {KNOWN}") from None
        if not unit:
            bailian = line.chat_id is not None
            unit = 1.0 if bailian else 1e-3
            tokens = tokens or (BAILIAN_TOKENS if bailian else MOONCAKE_TOKENS)
        if not (0 <= line.input_length < TOKENS_MAX and 0 <= line.output_length < TOKENS_MAX):
            raise TraceError(f"{where}: input_length and output_length: expected 0 to {TOKENS_MAX}")
        blocks = line.input_length // tokens
        if len(line.hash_ids) < blocks:
            raise TraceError(
                f"{where}: {len(line.hash_ids)} hash_ids for {line.input_length} tokens: expected "
                f"at least {blocks} of {tokens} tokens each; is the line cut off, or the size "
                "another?"
            )
        paths.add(where, line.timestamp * unit, line.hash_ids[:blocks], line.output_length)
    return paths.trace(path, tokens)


def _read_lookups(path: Path, lines: Iterable[tuple[str, bytes]]) -> Trace:
    decoder = msgspec.json.Decoder(_Lookup)
    paths, tokens = Paths(), 0
    for where, text in lines:
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"{where}: {error}; {KNOWN}") from None
        tokens = tokens or line.chunk_size
        if line.chunk_size != tokens or tokens < 1:
            raise TraceError(
                f"{where}: chunk_size is {line.chunk_size}, expected {tokens or 'one from 1 on'}"
            )
        paths.add(where, line.timestamp, line.chunk_hashes)
    return paths.trace(path, tokens)


# vLLM's events


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int | str]
    parent_block_hash: int | str | None
    block_size: int
    medium: str | None = None
    group_idx: int | None = None


class _StoredRow(msgspec.Struct, tag="BlockStored", array_like=True):
    block_hashes: list[int | str]
    parent_block_hash: int | str | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class _Chain:
    """A request that may go on: where it was read, when it began and was last heard of."""

    __slots__ = ("heard", "names", "start", "where")

    def __init__(self, where: str, start: float, names: list[Name]) -> None:
        self.where, self.start, self.names, self.heard = where, start, names, start


def _read_events(path: Path, lines: Iterable[tuple[str, bytes]], block_tokens: int | None) -> Trace:
    """See the module. Requests are held back until nothing can continue them."""
    paths, tokens, last = Paths(), block_tokens or 0, 0.0
    above: dict[Name, Name | None] = {}  # of each block, the one before it
    waiting: list[_Chain] = []  # in order of their start
    ends: dict[Name, _Chain] = {}
    for where, text in lines:
        now, stored = _stored(where, text)
        if now < last:
            raise TraceError(
                f"{where}: ts {now} goes back by {last - now:.3f} s: expected batches in order of "
                "time; record one rank, or sort the file"
            )
        last = now
        for event in stored:
            tokens = tokens or event.block_size
            if event.block_size != tokens or tokens < 1:
                raise TraceError(f"{where}: block_size is {event.block_size}, expected {tokens}")
            names, parent = event.block_hashes, event.parent_block_hash
            for name, before in zip(names, [parent, *names], strict=False):
                above[name] = before
            chain = ends.pop(parent, None) if parent is not None else None
            if chain is None or now - chain.heard > JOIN_S:
                chain = _Chain(where, now, _from_root(where, above, parent))
                waiting.append(chain)
            chain.names += names
            chain.heard = now
            ends[names[-1]] = chain
        while waiting and now - waiting[0].heard > JOIN_S:
            ready = waiting.pop(0)
            paths.add(ready.where, ready.start, ready.names)
        if len(ends) > 2 * len(waiting) + 64:
            ends = {name: chain for name, chain in ends.items() if now - chain.heard <= JOIN_S}
    for ready in waiting:
        paths.add(ready.where, ready.start, ready.names)
    return paths.trace(path, tokens or VLLM_TOKENS)


def _stored(where: str, text: bytes) -> tuple[float, list[_Stored | _StoredRow]]:
    """Return the time of a batch, and what it says was stored on the GPU in the first group."""
    row = text.lstrip()[:1] == b"["
    found: list[_Stored | _StoredRow] = []
    try:
        if row:
            batch = msgspec.json.decode(text)
            now, events = float(batch[0]), batch[1]
        else:
            decoded = msgspec.json.decode(text, type=_Batch)
            now, events = decoded.ts, decoded.events
        for event in events:
            kind = event[0] if isinstance(event, list) and event else None
            kind = event.get("type") if isinstance(event, dict) else kind
            if kind not in ("BlockStored", "BlockRemoved", "AllBlocksCleared"):
                raise msgspec.ValidationError(f"an event of type {kind!r}")
            if kind == "BlockStored":
                shape: type[_Stored | _StoredRow] = _StoredRow if row else _Stored
                one = msgspec.convert(event, shape)
                first = not getattr(one, "group_idx", None)
                if one.medium in (None, "GPU") and first and one.block_hashes:
                    found.append(one)
    except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
        raise TraceError(f"{where}: {error}; {KNOWN}") from None
    return now, found


def _from_root(where: str, above: dict[Name, Name | None], name: Name | None) -> list[Name]:
    """Return the blocks from the root to one; what was stored before the trace begins is a root."""
    path: list[Name] = []
    while name is not None:
        path.append(name)
        name = above.get(name)
        if len(path) > len(above) + 1:
            raise TraceError(f"{where}: a block comes before itself: expected chains of hashes")
    return path[::-1]


# LMCache's calls


class _Frame(msgspec.Struct):
    type: str
    magic: bytes = b""
    format_version: int = 0
    t_mono: float = 0.0
    qualname: str = ""
    args: dict[str, object] = msgspec.field(default_factory=dict)


def _read_calls(
    path: Path,
    stream: BinaryIO,
    size: int,
    block_tokens: int | None,
    progress: Progress | None,
) -> Trace:
    paths, decoder, done = Paths(), msgspec.msgpack.Decoder(_Frame), 0
    for number, (at, data) in enumerate(_frames(path, stream), 1):
        where = f"{path}, frame {number} at byte {at}"
        try:
            frame = decoder.decode(data)
        except msgspec.DecodeError as error:
            raise TraceError(f"{where}: {error}; expected a frame of LMCache's trace") from None
        if number == 1 and (frame.magic, frame.format_version) != (b"LMCT", 1):
            raise TraceError(f"{where}: expected a header of LMCache's trace, format 1")
        done = at + len(data)
        if progress is not None and number % TELL_EVERY == 0:
            progress(done, size)
        if frame.qualname.rpartition(".")[2] == "submit_prefetch_task":
            paths.add(where, frame.t_mono, _chunks(where, frame.args))
    return paths.trace(path, block_tokens or LMCACHE_TOKENS)


def _frames(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    at = 0
    while prefix := stream.read(4):
        length = struct.unpack(">I", prefix)[0] if len(prefix) == 4 else 0
        data = stream.read(length) if 0 < length <= FRAME_BYTES_MAX else b""
        if not length or len(data) < length:
            raise TraceError(
                f"{path}: cut off in the frame at byte {at}: {len(data)} bytes of {length}: "
                "expected whole frames, each behind its length"
            )
        yield at, data
        at += 4 + length


def _chunks(where: str, args: dict[str, object]) -> Iterator[bytes]:
    """Yield the hashes of one look-up, once each: every rank and group has a key of its own."""
    keys = args.get("keys")
    for value in args.values():
        if isinstance(value, dict) and value.get("__t__") == "PrefetchRequestSpec":
            keys = value["v"].get("keys")
    seen = set()
    for key in keys if isinstance(keys, list) else (None,):
        inner = key.get("v") if isinstance(key, dict) else None
        name = inner.get("chunk_hash") if isinstance(inner, dict) else None
        if not isinstance(name, bytes):
            raise TraceError(f"{where}: a look-up without keys: expected ObjectKey, chunk_hash")
        if name not in seen:
            seen.add(name)
            yield name


# kv-cache-tester's sessions


class _Turn(msgspec.Struct):
    t: float
    type: str
    model: str = ""
    out: int = -1
    stop: str | None = None
    hash_ids: list[int] = msgspec.field(default_factory=list)
    requests: list[_Turn] = msgspec.field(default_factory=list)
    tool_tokens: int = 0
    input: int = msgspec.field(name="in", default=0)


class _Session(msgspec.Struct):
    id: str
    block_size: int
    requests: list[_Turn]
    tool_tokens: int = 0


STOPS = (("tool_use", STOP_TOOL), ("end_turn", STOP_END))


def _read_sessions(path: Path, window_s: float, progress: Progress | None) -> Trace:
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"{path}: no .json file in it: expected sessions of kv-cache-tester")
    if not 0 <= window_s < 1e9:
        raise TraceError(f"window: given {window_s}, expected a number of seconds from 0 on")
    decoder, draw = msgspec.json.Decoder(_Session), np.random.default_rng(0)
    tokens, found = 0, []
    for done, file in enumerate(files):
        try:
            session = decoder.decode(file.read_bytes())
        except msgspec.DecodeError as error:
            raise TraceError(
                f"{file}: {error}; expected a session of kv-cache-tester: id, block_size, requests "
                "with t, type, in, out, hash_ids"
            ) from None
        tokens = tokens or session.block_size
        if session.block_size != tokens or tokens < 1:
            raise TraceError(f"{file}: block_size is {session.block_size}, expected {tokens}")
        start = float(draw.uniform(0, window_s))
        turns = _turns(session.requests, start, session.tool_tokens)
        found += [
            (now, file, number, turn, tools) for number, (now, turn, tools) in enumerate(turns)
        ]
        if progress is not None:
            progress(done + 1, len(files))
    found.sort(key=lambda each: each[0])
    paths, stops = Paths(), dict(STOPS)
    for now, file, number, turn, tools in found:
        where = f"{file}, request {number}"
        blocks = turn.input // tokens
        if not 0 <= blocks <= len(turn.hash_ids) or turn.input >= TOKENS_MAX:
            raise TraceError(
                f"{where}: {len(turn.hash_ids)} hash_ids for {turn.input} tokens: expected at "
                f"least {blocks} of {tokens} tokens each"
            )
        shared = min(tools // tokens, blocks)
        names: list[Name] = [("tools", turn.model, tools, at) for at in range(shared)]
        names += [(file.name, turn.model, 0, name) for name in turn.hash_ids[shared:blocks]]
        stop = stops.get(turn.stop or "", UNKNOWN_STOP)
        paths.add(where, now, names, min(turn.out, TOKENS_MAX), stop)
    return paths.trace(path, tokens)


def _turns(turns: Sequence[_Turn], start: float, tools: int) -> Iterator[tuple[float, _Turn, int]]:
    """Yield (time, request, tokens of tools) of a session and of the agents that it starts."""
    for turn in turns:
        if turn.requests:
            yield from _turns(turn.requests, start + turn.t, turn.tool_tokens)
        elif turn.type != "subagent":
            yield start + turn.t, turn, tools


# Prefix trees


def _read_tree(path: Path) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: not a whole .npz file: {error}") from None
    for name in ("parent_delta", "leaf", "nblk", "t_ms", "out_tok", "stop", "block_tokens"):
        if name not in columns:
            raise TraceError(f"{path}: no column {name!r}: expected a prefix tree and its requests")
    count = len(columns["parent_delta"])
    parents = np.arange(count) - 1 - columns["parent_delta"].astype(np.int64)
    leaves, counts = columns["leaf"].astype(np.int64), columns["nblk"].astype(np.int64)
    seconds = columns["t_ms"].astype(np.float64) / 1000
    if len({len(columns[name]) for name in ("leaf", "nblk", "t_ms", "out_tok", "stop")}) != 1:
        raise TraceError(f"{path}: leaf, nblk, t_ms, out_tok and stop: expected equal lengths")
    back = np.flatnonzero(np.diff(seconds) < 0)
    if len(back):
        raise TraceError(
            f"{path}, request {int(back[0]) + 1}: its time goes back: expected order of time"
        )
    sound = count and (parents >= -1).all() and (parents < np.arange(count)).all()
    if not sound or leaves.min(initial=0) < -1 or leaves.max(initial=0) >= count:
        raise TraceError(f"{path}: parent_delta or leaf points outside the tree")
    if counts.min(initial=0) < 0 or counts.sum() > BLOCKS_MAX:
        raise TraceError(f"{path}: nblk: expected 0 on, at most {BLOCKS_MAX} in all")
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    nodes = np.empty(int(offsets[-1]), dtype=np.int32)
    bad = _walk(
        column(parents.astype(np.int32)), column(leaves.astype(np.int32)), column64(offsets),
        len(leaves), column(nodes),
    )  # fmt: skip
    if bad >= 0:
        raise TraceError(f"{path}, request {bad}: nblk is not the depth of its leaf")
    unique, named = np.unique(nodes, return_inverse=True)
    return Trace(
        path.stem, int(columns["block_tokens"]), named.astype(np.int32), offsets, seconds,
        columns["out_tok"].astype(np.int32), columns["stop"].astype(np.int32),
        prints_of(len(unique)),
    )  # fmt: skip


@compiled
def _walk(parents: Int32s, leaves: Int32s, offsets: Int64s, count: int, nodes: Int32s) -> int:
    # Returns the first request whose path is not as long as it says, -1 where all are.
    for r in range(count):
        at, node = offsets[r + 1] - 1, int(leaves[r])
        while at >= offsets[r] and node >= 0:
            nodes[at] = node
            node = int(parents[node])
            at -= 1
        if at >= offsets[r] or (offsets[r + 1] > offsets[r] and node >= 0):
            return r
    return -1


# Writing


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
