"""Kernels alone: the copies and codecs of `kernels/`, against a copy of the same bytes.

Shapes are those of real models. A case without a shape in its name is Llama-3.1-8B with blocks of
16 tokens. A host core is measured against memcpy, a GPU against its own `copy_` (the copy roof),
both in the same run; caches and frames are larger than the processor's caches, and the bytes of a
round are not those of the round before. GB/s are of the bf16 bytes that the cache holds, whatever
an encoding makes of them. Digests are computed and verified where the operation does so in the
engine. The compile table needs no GPU: registers, spills, widest accesses and instructions of every
variant and target.
"""

import argparse
import importlib
import mmap
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table as Shown

from bench import runner
from bench.runner import Row, interleave, share, spread
from bench.runner import show as show_rows
from kvengine.kernels import build, copy, digest, launch, lossless, quant
from kvengine.kernels.copy import Int64s, Moves, Span
from kvengine.kernels.relayout import Form, relayout, relayout_reference
from kvengine.kernels.rows import Rows

row = partial(runner.row, "kernels")

MIB, KIB = 1 << 20, 1 << 10
PARTS = ("cpu", "compile", "gpu")
FRAME_ALIGN = 4096
POISON = 0xA5
BF16_BYTES = 2
COPIED = 2 * BF16_BYTES  # bytes that a copy reads and writes for an element


@dataclass(frozen=True)
class Shape:
    """What a block of a model holds: so many layers of K and V (or one latent), heads and dims."""

    model: str
    layers: int
    heads: int
    dims: tuple[int, ...]  # of K and V, or of the one latent
    tokens: int
    slots: bool = False  # tokens lie anywhere: a slot mapping, not a block table

    @property
    def label(self) -> str:
        return f"{self.model}/{self.tokens}{' slots' if self.slots else ''}"

    @property
    def pieces(self) -> int:
        """Contiguous pieces of a block: one a layer and component."""
        return self.layers * len(self.dims)

    @property
    def piece_bytes(self) -> int:
        return self.tokens * self.heads * self.dims[0] * BF16_BYTES

    @property
    def block_bytes(self) -> int:
        return self.pieces * self.piece_bytes


MODELS: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
    ("Llama-3.1-8B", 32, 8, (128, 128)),
    ("Qwen3-32B", 64, 8, (128, 128)),
    ("DeepSeek-V3", 61, 1, (576,)),  # MLA: one latent of 512 and a rotary key of 64
)
SHAPES = (
    *(Shape(*model, tokens) for model in MODELS for tokens in (16, 64, 256)),
    Shape(*MODELS[0], 16, slots=True),
    Shape(*MODELS[2], 64, slots=True),
)
HEADLINE = SHAPES[0]


Hash = Callable[[Int64s, Int64s], tuple[float, npt.NDArray[Any]]]


class Place(Protocol):
    """Memory and the operations on it, of a host core or of a GPU; slabs are arrays of bytes.

    code: encode or decode a table, and give its verdicts, where the place has them.
    """

    name: str
    roof: str  # the copy that bounds all others
    table_bytes: int  # moved in a round
    slab_bytes: int

    def slab(self, nbytes: int) -> Any: ...
    def fill(self, slab: Any, words: npt.NDArray[np.uint16]) -> None: ...
    def address(self, slab: Any) -> int: ...
    def copy(self, target: Any, source: Any) -> None: ...
    def gather(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> None: ...
    def scatter(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> bool: ...
    def code(
        self,
        coding: "Coding",
        verb: str,
        rows: Rows,
        digests: npt.NDArray[np.uint64],
        verdicts: npt.NDArray[np.uint8],
    ) -> Any: ...
    def save(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> float: ...
    def verify(
        self, moves: Moves, digests: npt.NDArray[np.uint64], verdicts: npt.NDArray[np.uint8]
    ) -> float: ...
    def digest(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]: ...
    def hash(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]: ...
    def swap(self, sources: Int64s, targets: Int64s, nbytes: Int64s) -> None: ...
    def pinned(self, nbytes: int) -> Any: ...
    def timed(self, function: Callable[[], object]) -> float: ...
    def equal(self, one: Any, other: Any) -> bool: ...
    def host(self, array: Any) -> npt.NDArray[np.uint8]: ...


class Host:
    """One core, by the fastest path that this installation has."""

    name, roof = "cpu", "memcpy"

    def __init__(self, table_bytes: int = 32 * MIB, slab_bytes: int = 256 * MIB) -> None:
        self.table_bytes, self.slab_bytes = table_bytes, slab_bytes

    def slab(self, nbytes: int) -> npt.NDArray[np.uint8]:
        memory = mmap.mmap(-1, nbytes)
        memory.madvise(mmap.MADV_HUGEPAGE)
        slab = np.frombuffer(memory, np.uint8)
        slab[:] = POISON
        return slab

    def fill(self, slab: npt.NDArray[np.uint8], words: npt.NDArray[np.uint16]) -> None:
        for at in range(0, len(slab), words.nbytes):
            part = slab[at : at + words.nbytes]
            part[:] = words.view(np.uint8)[: len(part)]

    def address(self, slab: npt.NDArray[np.uint8]) -> int:
        return slab.ctypes.data

    def copy(self, target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        np.copyto(target, source)

    def gather(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> None:
        copy.gather(moves, *everything(moves), digests)

    def scatter(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> bool:
        verdicts = np.zeros(digests.shape[:2], np.uint8)
        copy.scatter(moves, *everything(moves), digests, verdicts)
        return bool((verdicts == copy.GOOD).all())

    def code(
        self,
        coding: "Coding",
        verb: str,
        rows: Rows,
        digests: npt.NDArray[np.uint64],
        verdicts: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.uint8]:
        getattr(coding, verb)(rows, *everything(rows), digests, verdicts)
        return verdicts

    def save(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> float:
        return self.timed(lambda: copy.gather(moves, *everything(moves), digests))

    def verify(
        self, moves: Moves, digests: npt.NDArray[np.uint64], verdicts: npt.NDArray[np.uint8]
    ) -> float:
        return self.timed(lambda: copy.scatter(moves, *everything(moves), digests, verdicts))

    def digest(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]:
        found = np.zeros((len(nbytes), 2), np.uint64)
        return self.timed(lambda: digest.digest_spans(addresses, nbytes, found)), found

    def hash(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = []
        most = int(nbytes.max())
        took = self.timed(
            lambda: found.append(digest.hash_messages(addresses[:, None], most, nbytes))
        )
        return took, found[0]

    def swap(self, sources: Int64s, targets: Int64s, nbytes: Int64s) -> None:
        copy.copy_spans(sources, targets, nbytes)

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        return self.slab(nbytes)

    def timed(self, function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def equal(self, one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
        return np.array_equal(one, other)

    def host(self, array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return array


class Device:
    """One GPU, by torch's name of it. Launching, and the upload of the tables, count as well."""

    name, roof = "gpu", "copy"

    def __init__(
        self, device: str = "cuda", table_bytes: int = 1024 * MIB, slab_bytes: int = 4096 * MIB
    ) -> None:
        self.torch = importlib.import_module("torch")
        self.kernels = importlib.import_module("kvengine.kernels.device")
        self.xxh3 = importlib.import_module("kvengine.kernels.xxh3_device")
        self.blake3 = importlib.import_module("kvengine.kernels.blake3_device")
        self.swaps = importlib.import_module("kvengine.kernels.swap_device")
        self.device = device
        self.on = launch.launcher(device)
        self.table_bytes, self.slab_bytes = table_bytes, slab_bytes

    def slab(self, nbytes: int) -> Any:
        return self.torch.full((nbytes,), POISON, dtype=self.torch.uint8, device=self.device)

    def fill(self, slab: Any, words: npt.NDArray[np.uint16]) -> None:
        given = self.torch.from_numpy(words.view(np.uint8)).to(self.device)
        for at in range(0, len(slab), len(given)):
            part = slab[at : at + len(given)]
            part.copy_(given[: len(part)])

    def address(self, slab: Any) -> int:
        return int(slab.data_ptr())

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def gather(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> None:
        self.kernels.gather(moves, *everything(moves), self.device)

    def scatter(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> bool:
        self.kernels.scatter(moves, *everything(moves), self.device)
        return True  # the caller compares the bytes

    def code(
        self,
        coding: "Coding",
        verb: str,
        rows: Rows,
        digests: npt.NDArray[np.uint64],
        verdicts: npt.NDArray[np.uint8],
    ) -> Any:
        """Launch, and give the verdicts; the caller compares what was decoded."""
        kind = self.torch.uint8
        found = self.torch.full(verdicts.shape, copy.GOOD, dtype=kind, device=self.device)
        coding.launch(verb, rows, found, self.device)
        return found

    def save(self, moves: Moves, digests: npt.NDArray[np.uint64]) -> float:
        found = self.on.table(digests)
        took = self.timed(lambda: self.xxh3.gather(moves, *everything(moves), found, self.on))
        digests[:] = self.on.read(found)
        return took

    def verify(
        self, moves: Moves, digests: npt.NDArray[np.uint64], verdicts: npt.NDArray[np.uint8]
    ) -> float:
        wanted, found = self.on.table(digests), self.on.table(verdicts)
        took = self.timed(
            lambda: self.xxh3.scatter(moves, *everything(moves), wanted, found, self.on)
        )
        verdicts[:] = self.on.read(found)
        return took

    def digest(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]:
        found = self.on.empty((len(nbytes), 2), np.uint64)
        took = self.timed(lambda: self.xxh3.digest_spans(addresses, nbytes, found, self.on))
        return took, self.on.read(found)

    def hash(self, addresses: Int64s, nbytes: Int64s) -> tuple[float, npt.NDArray[Any]]:
        found, most = self.on.empty((len(nbytes), 8), np.uint32), int(nbytes.max())
        took = self.timed(
            lambda: self.blake3.hash_messages(addresses[:, None], most, nbytes, found, self.on)
        )
        return took, self.on.read(found)

    def swap(self, sources: Int64s, targets: Int64s, nbytes: Int64s) -> None:
        self.swaps.swap(sources, targets, nbytes, self.on)

    def pinned(self, nbytes: int) -> Any:
        pinned = self.device != "cpu"
        slab = self.torch.empty(nbytes, dtype=self.torch.uint8, pin_memory=pinned)
        return slab.fill_(POISON)

    def timed(self, function: Callable[[], object]) -> float:
        if self.device == "cpu":  # the interpreter
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def equal(self, one: Any, other: Any) -> bool:
        return bool(self.torch.equal(one, other))

    def host(self, array: Any) -> npt.NDArray[np.uint8]:
        return np.asarray(array.cpu())


def everything(table: Moves | Rows) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, len(table.frames)), (0, len(table.segments))


class Bytes:
    """The slabs of a place, made once for all shapes."""

    def __init__(self, place: Place, random: np.random.Generator) -> None:
        self.place = place
        slabs = (place.slab(place.slab_bytes) for _ in range(4))
        self.cache, self.frames, self.coded, self.spare = slabs
        place.fill(self.cache, like_keys(random))


class Mover:
    """A paged cache of one shape: the first half of its blocks is saved, the second half loaded.

    The cache is a slab [pieces, blocks, piece_bytes], piece by piece as a serving engine's tensors
    lie; frames stand in another, page-aligned.
    """

    def __init__(self, shape: Shape, slabs: Bytes, random: np.random.Generator) -> None:
        self.shape, self.slabs, self.random = shape, slabs, random
        self.place = slabs.place
        self.count = max(1, self.place.table_bytes // shape.block_bytes)
        self.nbytes = self.count * shape.block_bytes
        self.blocks = self.place.slab_bytes // shape.block_bytes
        assert self.blocks >= 2 * self.count  # one half for each direction
        self.unit = shape.tokens if shape.slots else 1  # units of a block
        self.unit_bytes = shape.piece_bytes // self.unit
        self.frame_bytes = -(-shape.block_bytes // FRAME_ALIGN) * FRAME_ALIGN
        self.tables = self.place.slab_bytes // (self.count * self.frame_bytes)
        assert self.tables >= 2  # a gather leaves the frames of the one before
        self.turn = self.copied = self.turn_loaded = 0
        self.digests = np.zeros((self.count, shape.layers, 2), np.uint64)
        self.good = True
        self.saved = self.draw(0)
        self.loaded = self.draw(1)
        self.components, self.segments = self.describe()

    def describe(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        shape, each = self.shape, len(self.shape.dims)
        base = self.place.address(self.slabs.cache)
        components = np.zeros((shape.pieces, copy.COLUMNS), np.int64)
        components[:, copy.BASE] = base + np.arange(shape.pieces) * self.blocks * shape.piece_bytes
        components[:, [copy.OUTER, copy.INNER]] = 1
        components[:, copy.RUN] = components[:, copy.UNIT_FRAME] = self.unit_bytes
        components[:, copy.FRAME] = np.arange(shape.pieces) * shape.piece_bytes
        layer = np.arange(shape.layers)
        nbytes = each * shape.piece_bytes
        columns = (layer * each, layer * 0 + each, layer * nbytes, layer * 0 + nbytes)
        return components, np.stack(columns, axis=1)

    def draw(self, half: int) -> npt.NDArray[np.int64]:
        """Choose the units of a table, int64[count, unit], in one half of the cache."""
        units = self.blocks // 2 * self.unit
        chosen = self.random.permutation(units)[: self.count * self.unit]
        return (half * units + chosen).reshape(self.count, self.unit)

    def moves(self, units: npt.NDArray[np.int64]) -> Moves:
        starts = np.arange(self.count) * self.frame_bytes + self.at(self.turn)
        offsets = (units * self.unit_bytes)[None]
        frames = starts + self.place.address(self.slabs.frames)
        return Moves(self.components, offsets, self.segments, frames)

    def at(self, turn: int) -> int:
        """Where the frames of a turn begin in their slab."""
        return turn % self.tables * self.count * self.frame_bytes

    def stretch(self) -> int:
        """Where the next stretch of a table's bytes begins in a slab, from one end to the other."""
        self.copied += 1
        return self.copied % (self.place.slab_bytes // self.nbytes) * self.nbytes

    def copy(self) -> float:
        """Copy as many bytes."""
        start = self.stretch()
        target = self.slabs.spare[start : start + self.nbytes]
        source = self.slabs.cache[start : start + self.nbytes]
        return self.place.timed(lambda: self.place.copy(target, source))

    def gather(self) -> float:
        self.turn += 1
        self.saved = self.draw(0)
        moves = self.moves(self.saved)
        return self.place.timed(lambda: self.place.gather(moves, self.digests))

    def scatter(self) -> float:
        """Give what was last gathered to other blocks."""
        if not self.turn:
            self.gather()
        self.loaded, self.turn_loaded = self.draw(1), self.turn
        moves = self.moves(self.loaded)
        good: list[bool] = []
        took = self.place.timed(lambda: good.append(self.place.scatter(moves, self.digests)))
        self.good &= good == [True]
        return took

    def gathered(self) -> bool:
        """Compare the frames of the last gather with the cache, and their digests."""
        self.good &= self.place.equal(self.in_frames(self.turn), self.in_cache(self.saved))
        if self.place.name == "cpu":
            moves = self.moves(self.saved)
            digests = np.zeros_like(self.digests)
            copy.gather_reference(moves, *everything(moves), digests)
            self.good &= np.array_equal(digests, self.digests)
        return self.good

    def scattered(self) -> bool:
        """Compare the blocks of the last scatter with its frames."""
        frames = self.in_frames(self.turn_loaded)
        return self.good and self.place.equal(frames, self.in_cache(self.loaded))

    def in_frames(self, turn: int) -> Any:
        """Give the bytes of the frames of a turn, [pieces, count, piece_bytes]."""
        start = self.at(turn)
        end = start + self.count * self.frame_bytes
        frames = self.slabs.frames[start:end].reshape(self.count, self.frame_bytes)
        whole = frames[:, : self.shape.block_bytes]
        return whole.reshape(self.count, self.shape.pieces, -1).swapaxes(0, 1)

    def in_cache(self, units: npt.NDArray[np.int64], slab: Any = None) -> Any:
        """Give the bytes of these units of a cache, [pieces, count, piece_bytes]."""
        pieces = self.shape.pieces
        used = pieces * self.blocks * self.shape.piece_bytes
        slab = self.slabs.cache if slab is None else slab
        cache = slab[:used].reshape(pieces, -1, self.unit_bytes)
        return cache[:, units.reshape(-1)].reshape(pieces, self.count, -1)


def like_keys(random: np.random.Generator) -> npt.NDArray[np.uint16]:
    """Make bf16 words as K has them: Gaussian, with a scale of its own for each of 64 channels.

    The channels of a token are a multiple of 64 in every shape, so each keeps its scale.
    """
    values = random.standard_normal((1 << 17, 64), np.float32)
    values *= np.exp(random.normal(0, 0.7, 64)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1)


@dataclass(frozen=True)
class Point:
    """A measured operation in the plot."""

    place: str
    case: str
    moved: float  # bytes of memory read and written for a bf16 element
    speed: float  # elements a second
    roof: float  # bytes read and written a second by the bare copy


@dataclass(frozen=True)
class Operation:
    """One thing that is measured on the bytes of a mover, against a copy of as many.

    turn: does it once, on bytes that the turn before did not touch, and gives its seconds.
    matches: compares what the last turn left with a reference. moved: bytes of memory read and
    written for a bf16 element.
    """

    name: str
    turn: Callable[[], float]
    matches: Callable[[], bool]
    moved: float


def raw(mover: Mover) -> Iterable[Operation]:
    yield Operation("gather raw", mover.gather, mover.gathered, COPIED)
    yield Operation("scatter raw", mover.scatter, mover.scattered, COPIED)


def digested(mover: Mover) -> Iterable[Operation]:
    """Copy and digest, verify and copy: on a host `raw` does so already."""
    if mover.place.name == "cpu":
        return
    place = mover.place
    verdicts = np.zeros(mover.digests.shape[:2], np.uint8)

    def gather() -> float:
        mover.turn += 1
        mover.saved = mover.draw(0)
        return place.save(mover.moves(mover.saved), mover.digests)

    def scatter() -> float:
        mover.loaded, mover.turn_loaded = mover.draw(1), mover.turn
        moves = mover.moves(mover.loaded)
        addresses = moves.frames[:, None] + moves.segments[:, copy.OFFSET]
        nbytes = np.tile(moves.segments[:, copy.NBYTES], mover.count)
        found = place.digest(addresses.reshape(-1), nbytes)[1]
        mover.digests[:] = found.reshape(mover.digests.shape)
        verdicts[:] = 0
        return place.verify(moves, mover.digests, verdicts)

    def verified() -> bool:
        return mover.scattered() and bool((verdicts == copy.GOOD).all())

    yield Operation("gather digested", gather, mover.gathered, COPIED)
    yield Operation("scatter verified", scatter, verified, COPIED)


def checksum(mover: Mover) -> Iterable[Operation]:
    """Digest segments where they lie, without moving them: what verifies a block that is held."""
    place = mover.place
    nbytes = np.full(mover.count * mover.shape.layers, mover.nbytes, np.int64)
    nbytes //= len(nbytes)
    size = int(nbytes[0])

    def turn(hash: Hash) -> tuple[int, float, npt.NDArray[Any]]:
        start = mover.stretch()
        addresses = place.address(mover.slabs.cache) + start + np.arange(len(nbytes)) * size
        return start, *hash(addresses, nbytes)

    def matches(hash: Hash, reference: Callable[[Int64s], npt.NDArray[Any]]) -> bool:
        start, _, found = turn(hash)
        data = place.host(mover.slabs.cache[start : start + len(nbytes) * size])
        return np.array_equal(reference(data.ctypes.data + np.arange(len(nbytes)) * size), found)

    def xxh3(addresses: Int64s) -> npt.NDArray[Any]:
        return np.array([digest.digest(at, size) for at in addresses.tolist()], np.uint64)

    def blake3(addresses: Int64s) -> npt.NDArray[Any]:
        return digest.hash_messages(addresses[:, None], size, nbytes)

    yield Operation(
        "digest xxh3",
        lambda: turn(place.digest)[1],
        lambda: matches(place.digest, xxh3),
        BF16_BYTES,
    )
    yield Operation(
        "digest blake3",
        lambda: turn(place.hash)[1],
        lambda: matches(place.hash, blake3),
        BF16_BYTES,
    )


def reshaped(mover: Mover) -> Iterable[Operation]:
    """Turn frames from NHD to HND, split their heads over two ranks, and merge them again."""
    shape, place = mover.shape, mover.place
    if shape.heads == 1 or shape.slots:
        return
    rows = tuple(dim * BF16_BYTES for dim in shape.dims)
    whole = Form("NHD", shape.layers, shape.tokens, shape.heads, rows)
    turned = Form("HND", shape.layers, shape.tokens, shape.heads, rows)
    half = Form("NHD", shape.layers, shape.tokens, shape.heads // 2, rows)
    source, target = (place.address(slab) for slab in (mover.slabs.frames, mover.slabs.spare))
    starts: dict[str, int] = {}

    def moves(name: str, narrow: Form) -> Moves:
        parts = shape.heads // narrow.heads
        starts[name] = mover.stretch()
        at = starts[name] + np.arange(mover.count) * shape.block_bytes
        pieces = at[:, None] + np.arange(parts) * narrow.nbytes
        return relayout(whole, narrow, source + at, target + pieces)

    def turn(name: str, narrow: Form, verb: str) -> float:
        described = moves(name, narrow)
        digests = np.zeros((len(described.frames), shape.layers, 2), np.uint64)
        if verb == "scatter":
            place.gather(described, digests)
            mover.slabs.frames[starts[name] : starts[name] + mover.nbytes] = POISON
        return place.timed(lambda: getattr(place, verb)(described, digests))

    def matches(name: str, narrow: Form, verb: str) -> bool:
        turn(name, narrow, verb)  # other turns have written there since
        start = starts[name]
        count = min(2, mover.count)  # of the blocks: the reference is slow
        wide, parts = (
            place.host(slab[start : start + count * shape.block_bytes])
            for slab in (mover.slabs.frames, mover.slabs.spare)
        )
        wanted = relayout_reference(whole, narrow, wide.reshape(count, -1))
        return np.array_equal(wanted.reshape(-1), parts)

    for name, narrow, verb in (
        ("relayout raw", turned, "gather"),
        ("split raw", half, "gather"),
        ("merge raw", half, "scatter"),
    ):
        yield Operation(
            name,
            lambda name=name, narrow=narrow, verb=verb: turn(name, narrow, verb),
            lambda name=name, narrow=narrow, verb=verb: matches(name, narrow, verb),
            COPIED,
        )


def equal_bytes(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    return np.array_equal(one, other)


@dataclass(frozen=True)
class Coding:
    """A codec of elements, and how it is called on the host and on a device.

    nbytes: of a component of a shape once it is encoded, of keys or of values; 0 where the codec
    does not fit. The calls take Rows, ranges, digests and verdicts of a table; `encode` and
    `decode` are the host's, `reference` what both must equal, `back` the reference of decoding
    (None: what was encoded). launch: takes the verb, Rows, verdicts and the device. codes and
    values: whether encoded and decoded bytes are as they must be.
    """

    name: str
    nbytes: Callable[[Shape, bool], int]
    encode: Callable[..., None]
    decode: Callable[..., None]
    reference: Callable[..., None]
    launch: Callable[[str, Rows, Any, Any], None]
    back: Callable[..., None] | None = None
    codes: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], bool] = equal_bytes
    values: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], bool] = equal_bytes


def lossless_nbytes(shape: Shape, keys: bool) -> int:
    channels = shape.heads * shape.dims[0]
    fits = shape.dims[0] % lossless.GROUP == 0 and lossless.pays(shape.tokens, channels)
    return lossless.encoded_nbytes(shape.tokens, channels) if fits else 0


def launch_lossless(verb: str, rows: Rows, verdicts: Any, device: Any) -> None:
    kernels = importlib.import_module("kvengine.kernels.lossless_device")
    if verb == "encode":
        kernels.encode(rows, *everything(rows), verdicts, device)
    else:
        kernels.decode(rows, *everything(rows), device)


def quantising(scheme: str) -> Coding:
    def nbytes(shape: Shape, keys: bool) -> int:
        if quant.fits(scheme, shape.dims[0]):
            return 0
        return sum(quant.planes(scheme, shape.heads, shape.tokens, shape.dims[0], keys))

    def encode(
        rows: Rows, blocks: Span, segments: Span, digests: Any, verdicts: Any, **how: bool
    ) -> None:
        quant.encode(scheme, rows, blocks, segments, digests, **how)
        verdicts[...] = copy.GOOD

    def launch_it(verb: str, rows: Rows, verdicts: Any, device: Any) -> None:
        kernels = importlib.import_module("kvengine.kernels.quant_device")
        getattr(kernels, verb)(scheme, rows, *everything(rows), device)

    sums = scheme == "rot4"  # which are added in any order
    return Coding(
        scheme,
        nbytes,
        encode,
        partial(quant.decode, scheme),
        partial(encode, native=False),
        launch_it,
        partial(quant.decode, scheme, native=False),
        nearly_all if sums else equal_bytes,
        close if sums else equal_bytes,
    )


def nearly_all(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether at most one byte in a thousand differs: a value on the edge between two levels."""
    return one.shape == other.shape and bool((one != other).mean() <= 1e-3)


def close(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Whether bf16 values are equal but for their last bit."""
    a, b = (
        quant.floats(np.ascontiguousarray(each).view(np.uint16), "bfloat16")
        for each in (one, other)
    )
    return np.allclose(a, b, rtol=2**-7, atol=1e-3 * float(np.abs(b).max()))


CODINGS = (
    Coding(
        "lossless",
        lossless_nbytes,
        lossless.encode,
        lossless.decode,
        lossless.encode_reference,
        launch_lossless,
    ),
    *(quantising(scheme) for scheme in quant.SCHEMES),
)


class Coder:
    """A codec on a mover's bytes: blocks of its cache are encoded, and decoded to a spare one."""

    def __init__(self, mover: Mover, coding: Coding) -> None:
        self.mover, self.coding, self.shape = mover, coding, mover.shape
        self.place, self.slabs = mover.place, mover.slabs
        sizes = [coding.nbytes(mover.shape, part == 0) for part in range(len(mover.shape.dims))]
        ends = np.cumsum(sizes * mover.shape.layers)
        self.layer_bytes = sum(sizes)
        self.places = np.concatenate(([0], ends[:-1]))
        self.nbytes = int(ends[-1])  # of a block
        self.turn = 0
        self.saved = self.loaded = mover.draw(0)
        self.digests = np.zeros_like(mover.digests)
        self.verdicts = np.zeros(self.digests.shape[:2], np.uint8)

    def rows(self, base: int, stride: int, units: npt.NDArray[np.int64], frame: int) -> Rows:
        """Describe blocks of a cache [pieces, blocks, piece_bytes], and their encoded frames.

        stride: from a piece of the cache to the next; frame: address of the first frame.
        """
        shape, each = self.shape, len(self.shape.dims)
        piece, layer = np.arange(shape.pieces), np.arange(shape.layers)
        width = shape.dims[0] * BF16_BYTES
        token = 0 if shape.slots else shape.heads * width
        columns = (base + piece * stride, 0, token, width, shape.heads, shape.dims[0])
        components = np.empty((shape.pieces, 8), np.int64)
        for i, column in enumerate((*columns, piece % each == 0, self.places)):
            components[:, i] = column
        size = self.layer_bytes
        segments = np.stack((layer * each, layer * 0 + each, layer * size, layer * 0 + size), 1)
        frames = frame + np.arange(len(units)) * self.mover.frame_bytes
        offsets = np.ascontiguousarray(units * self.mover.unit_bytes)[None]
        return Rows(components, offsets, segments, frames, shape.tokens, "bfloat16")

    def table(self, slab: Any, units: npt.NDArray[np.int64]) -> Rows:
        """Describe a table of this turn."""
        frame = self.place.address(self.slabs.coded) + self.mover.at(self.turn)
        stride = self.mover.blocks * self.shape.piece_bytes
        return self.rows(self.place.address(slab), stride, units, frame)

    def timed(self, verb: str, rows: Rows) -> float:
        tables = (self.digests, self.verdicts)
        found: list[Any] = []
        took = self.place.timed(
            lambda: found.append(self.place.code(self.coding, verb, rows, *tables))
        )
        self.verdicts = self.place.host(found[0])
        return took

    def encode(self) -> float:
        self.turn += 1
        self.saved = self.mover.draw(0)
        return self.timed("encode", self.table(self.slabs.cache, self.saved))

    def decode(self) -> float:
        """Decode what was last encoded."""
        self.loaded = self.mover.draw(1)
        return self.timed("decode", self.table(self.slabs.spare, self.loaded))

    def encoded(self) -> bool:
        """Encode once more, and compare with the reference."""
        self.encode()
        mover, count = self.mover, len(self.saved)
        cache = self.place.host(mover.in_cache(self.saved)).copy()
        coded = np.full((count, mover.frame_bytes), POISON, np.uint8)
        units = np.arange(self.saved.size).reshape(self.saved.shape)
        address = cache.ctypes.data
        rows = self.rows(address, count * self.shape.piece_bytes, units, coded.ctypes.data)
        digests, verdicts = np.zeros_like(self.digests), np.zeros_like(self.verdicts)
        self.coding.reference(rows, *everything(rows), digests, verdicts)
        start = mover.at(self.turn)
        found = self.place.host(self.slabs.coded[start : start + coded.size])
        size = self.nbytes
        same = self.coding.codes(found.reshape(coded.shape)[:, :size], coded[:, :size])
        if self.place.name == "cpu" and self.coding.codes is equal_bytes:
            same &= np.array_equal(digests, self.digests)
        return same and np.array_equal(verdicts, self.verdicts)

    def decoded(self) -> bool:
        """Encode and decode once more, and compare with what must come back."""
        self.encode()
        self.decode()
        found = self.mover.in_cache(self.loaded, self.slabs.spare)
        good = bool((self.verdicts == copy.GOOD).all())
        if self.coding.back is None:
            return good and self.place.equal(found, self.mover.in_cache(self.saved))
        start, count = self.mover.at(self.turn), len(self.saved)
        end = start + count * self.mover.frame_bytes
        frames = self.place.host(self.slabs.coded[start:end]).copy()
        wanted = np.full((self.shape.pieces, count, self.shape.piece_bytes), POISON, np.uint8)
        units = np.arange(self.saved.size).reshape(self.saved.shape)
        stride = count * self.shape.piece_bytes
        rows = self.rows(wanted.ctypes.data, stride, units, frames.ctypes.data)
        addresses = (rows.frames[:, None] + rows.segments[:, 2]).reshape(-1)
        sizes = np.tile(rows.segments[:, 3], count)
        digests, verdicts = np.zeros_like(self.digests), np.zeros_like(self.verdicts)
        digest.digest_spans(addresses, sizes, digests.reshape(-1, 2))
        self.coding.back(rows, *everything(rows), digests, verdicts)
        return good and self.coding.values(self.place.host(found), wanted)


def coded(mover: Mover) -> Iterable[Operation]:
    for coding in CODINGS:
        if coding.nbytes(mover.shape, True):
            coder = Coder(mover, coding)
            moved = BF16_BYTES * (1 + coder.nbytes / mover.shape.block_bytes)
            yield Operation(f"{coding.name} encode", coder.encode, coder.encoded, moved)
            yield Operation(f"{coding.name} decode", coder.decode, coder.decoded, moved)


# What is measured on a mover's bytes; an encoding gives nothing where its place or shape does not
# fit.
ENCODINGS: tuple[Callable[[Mover], Iterable[Operation]], ...] = (
    raw,
    digested,
    checksum,
    reshaped,
    coded,
)


def measured(
    place: Place, shapes: Iterable[Shape], rounds: int
) -> Iterator[tuple[list[Row], list[Point]]]:
    """Measure every operation of a place, shape by shape."""
    random = np.random.default_rng(4)
    slabs = Bytes(place, random)
    for shape in shapes:
        mover = Mover(shape, slabs, random)
        operations = [each for encoding in ENCODINGS for each in encoding(mover)]
        turns = {"copy": mover.copy} | {each.name: each.turn for each in operations}
        took = interleave(turns, rounds, warmup=mover.tables + 2)
        elements = mover.nbytes / BF16_BYTES
        roof = elements / spread(took["copy"]).p50
        rows, points = [], []
        for each in operations:
            suffix = "" if shape == HEADLINE else f" {shape.label}"
            case, ours = f"{place.name} {each.name}{suffix}", took[each.name]
            rows += speeds(case, place.roof, mover.nbytes, took["copy"], ours, each.matches())
            speed = elements / spread(ours).p50
            points.append(Point(place.name, case, each.moved, speed, roof * COPIED))
        yield rows, points


PAGES = (4 * KIB, 16 * KIB, 64 * KIB)


def swaps(place: Place, pages: Sequence[int], rounds: int) -> tuple[list[Row], list[Point]]:
    """Read scattered pages from host memory (pinned, where there is a GPU), against one large copy.

    On a GPU the bound is the link to the host: what one copy of as many bytes from pinned memory
    reaches.
    """
    nbytes = min(place.table_bytes, place.slab_bytes // 4)
    random = np.random.default_rng(5)
    source, target = place.pinned(2 * nbytes), place.slab(2 * nbytes)
    words = random.integers(0, 1 << 16, nbytes // 2, dtype=np.uint16)
    place.host(source)[:nbytes] = words.view(np.uint8)
    place.host(source)[nbytes:] = words.view(np.uint8)[::-1]

    def bulk() -> float:
        return place.timed(lambda: place.copy(target[:nbytes], source[:nbytes]))

    def turn(page: int) -> tuple[float, Int64s, Int64s]:
        count = nbytes // page
        these, those = (random.permutation(2 * count)[:count] for _ in range(2))
        at = (place.address(source) + these * page, place.address(target) + those * page)
        size = np.full(count, page, np.int64)
        return place.timed(lambda: place.swap(*at, size)), these, those

    def matches(page: int) -> bool:
        target[:] = POISON
        _, these, those = turn(page)
        given, found = place.host(source), place.host(target)
        wanted = np.full_like(found, POISON).reshape(-1, page)
        wanted[those] = given.reshape(-1, page)[these]
        return np.array_equal(wanted.reshape(-1), found)

    turns: dict[str, Callable[[], float]] = {"bulk": bulk}
    turns |= {str(page): lambda page=page: turn(page)[0] for page in pages}  # type: ignore[misc]
    took = interleave(turns, rounds)
    rows, points = [], []
    roof = "memcpy" if place.name == "cpu" else "link"
    for page in pages:
        case = f"{place.name} swap pages {page / KIB:g} KiB"
        ours = took[str(page)]
        rows += speeds(case, roof, nbytes, took["bulk"], ours, matches(page))
        if place.name == "cpu":
            speed = nbytes / BF16_BYTES / spread(ours).p50
            bulk_speed = nbytes / BF16_BYTES / spread(took["bulk"]).p50
            points.append(Point(place.name, case, COPIED, speed, bulk_speed * COPIED))
    return rows, points


def pairs(places: Sequence[Place], shape: Shape, rounds: int) -> list[Row]:
    """Save a table by one place and verify it by another, through frames that both reach.

    Each place has a cache of its own; frames lie in the host's memory, pinned where there is a
    GPU. Seconds are those of both steps; the bound is twice a copy of as many bytes by the host.
    """
    random = np.random.default_rng(6)
    host = places[0]
    count = max(1, min(place.table_bytes for place in places) // shape.block_bytes)
    blocks = 4 * count
    nbytes = count * shape.block_bytes
    frames = places[-1].pinned(count * shape.block_bytes)
    words = random.integers(0, 1 << 16, blocks * shape.block_bytes // 2, dtype=np.uint16)
    caches = {place.name: place.slab(blocks * shape.block_bytes) for place in places}
    for place in places:
        place.fill(caches[place.name], words)
    spare = host.slab(2 * nbytes)
    good: dict[str, bool] = {}

    def moves(place: Place, half: int) -> Moves:
        each = len(shape.dims)
        components = np.zeros((shape.pieces, copy.COLUMNS), np.int64)
        base = place.address(caches[place.name])
        components[:, copy.BASE] = base + np.arange(shape.pieces) * blocks * shape.piece_bytes
        components[:, [copy.OUTER, copy.INNER]] = 1
        components[:, copy.RUN] = shape.piece_bytes
        components[:, copy.FRAME] = np.arange(shape.pieces) * shape.piece_bytes
        layer, size = np.arange(shape.layers), each * shape.piece_bytes
        columns = (layer * each, layer * 0 + each, layer * size, layer * 0 + size)
        chosen = half * (blocks // 2) + random.permutation(blocks // 2)[:count]
        starts = places[-1].address(frames) + np.arange(count) * shape.block_bytes
        offsets = (chosen * shape.piece_bytes).reshape(1, count, 1)
        return Moves(components, offsets, np.stack(columns, axis=1), starts)

    def turn(saver: Place, verifier: Place) -> float:
        digests = np.zeros((count, shape.layers, 2), np.uint64)
        verdicts = np.zeros(digests.shape[:2], np.uint8)
        took = saver.save(moves(saver, 0), digests)
        took += verifier.verify(moves(verifier, 1), digests, verdicts)
        right = bool((verdicts == copy.GOOD).all())
        wanted = np.zeros_like(digests)
        described = moves(host, 0)
        addresses = (described.frames[:, None] + described.segments[:, copy.OFFSET]).reshape(-1)
        sizes = np.tile(described.segments[:, copy.NBYTES], count)
        digest.digest_spans(addresses, sizes, wanted.reshape(-1, 2))
        name = f"{saver.name} {verifier.name}"
        good[name] = good.get(name, True) and right and np.array_equal(wanted, digests)
        return took

    def bulk() -> float:
        return host.timed(
            lambda: [
                host.copy(spare[half * nbytes : (half + 1) * nbytes], host.host(frames))
                for half in range(2)
            ]
        )

    turns: dict[str, Callable[[], float]] = {"bulk": bulk}
    for saver in places:
        for verifier in places:
            name = f"{saver.name} {verifier.name}"
            turns[name] = lambda saver=saver, verifier=verifier: turn(  # type: ignore[misc]
                saver, verifier
            )
    took = interleave(turns, rounds)
    rows = []
    for name in [name for name in turns if name != "bulk"]:
        saver_name, verifier_name = name.split()
        case = f"saved by {saver_name}, verified by {verifier_name}"
        rows += speeds(case, "memcpy", 2 * nbytes, took["bulk"], took[name], good[name])
    return rows


def speeds(
    case: str,
    roof: str,
    nbytes: int,
    bound: Sequence[float],
    ours: Sequence[float],
    matches: bool,
) -> list[Row]:
    found = share(bound, ours)
    speed = spread([nbytes / seconds / 1e9 for seconds in ours])
    top = nbytes / spread(bound).p50 / 1e9
    return [
        row(case, f"share_of_{roof}", "ratio", found, 1.0, matches),
        row(case, "speed", "GB/s", speed, top, matches),
    ]


def compiled() -> list[Row]:
    """Compile every variant for every target: totals of each target, then each variant."""
    variants = importlib.import_module("kvengine.kernels.variants").VARIANTS
    totals, rows = [], []
    for target in build.TARGETS:
        made = [(each, build.compile(each, target)) for each in variants if target in each.targets]
        narrow = [
            built.name
            for each, built in made
            if built.load_bits < each.load_bits or built.store_bits < each.store_bits
        ]
        case = f"compile {target}"
        totals += [
            only(case, "spills", "count", sum(built.spills for _, built in made)),
            only(case, "local_bytes", "bytes", sum(built.local_bytes for _, built in made)),
            only(case, "narrow", "variants", len(narrow)),
            only(case, "registers", "most", max(built.registers for _, built in made)),
            only(case, "count", "variants", len(made)),
        ]
        for each, built in made:
            name = f"{case} {each.name}"
            rows += [
                only(name, "registers", "count", built.registers),
                only(name, "spills", "count", built.spills),
                only(name, "local_bytes", "bytes", built.local_bytes),
                only(name, "load_bits", "bits", built.load_bits),
                only(name, "store_bits", "bits", built.store_bits),
                only(name, "instructions", "count", built.instructions),
            ]
            per = build.instructions_per_element(each, built)
            if per is not None:
                rows.append(only(name, "instructions_per_element", "count", per))
    return totals + rows


def only(case: str, metric: str, unit: str, value: float) -> Row:
    return Row(bench="kernels", case=case, metric=metric, unit=unit, value=float(value))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parts", type=parts, default=PARTS, help=f"some of {','.join(PARTS)} (default all)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the measured speeds")


def parts(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"given {text!r}, expected some of {','.join(PARTS)}")
    return chosen


def run(options: argparse.Namespace) -> list[Row]:
    """Measure what this machine has: one core, the compiler, and a GPU where there is one."""
    if options.svg and not launch.available("matplotlib"):
        sys.exit("--svg needs matplotlib: pip install 'kvengine[bench]'")
    rows: list[Row] = []
    points: list[Point] = []
    places: list[Place] = []
    if "cpu" in options.parts:
        places.append(Host())
    if "gpu" in options.parts and gpu():
        places.append(Device())
    for place in places:
        for found, drawn in measured(place, SHAPES, options.rounds):
            rows += found
            points += drawn
        found, drawn = swaps(place, PAGES, options.rounds)
        rows += found
        points += drawn
    if places:
        rows += pairs(places, HEADLINE, options.rounds)
    if "compile" in options.parts:
        if launch.available("triton") and launch.available("torch"):
            rows += compiled()
        else:
            print("no compile table: it needs triton and torch", file=sys.stderr)
    if options.svg:
        draw(points, options.svg)
    return rows


def gpu() -> bool:
    if not (launch.available("triton") and launch.available("torch")):
        return False
    return bool(importlib.import_module("torch").cuda.is_available())


def show(rows: Sequence[Row], console: Console) -> None:
    """Print what was measured as every bench does, and the compile table a line a variant."""
    measured_here = [each for each in rows if not each.case.startswith("compile ")]
    if measured_here:
        show_rows(measured_here, console)
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for each in rows:
        if each.case.startswith("compile "):
            _, target, *name = each.case.split(" ", 2)
            cells.setdefault((name[0] if name else "all", target), {})[each.metric] = each.value
    if not cells:
        return
    table = Shown(
        title="registers · spills · widest load/store in bits · instructions an element",
        title_justify="left",
    )
    table.add_column("variant")
    for target in build.TARGETS:
        table.add_column(target, justify="right")
    for variant in dict.fromkeys(name for name, _ in cells):
        found = [cells.get((variant, target)) for target in build.TARGETS]
        table.add_row(variant, *(cell(each) for each in found))
    console.print(table)


def cell(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "refused"
    head = f"{found['registers']:.0f} · {found['spills']:.0f}"
    if "load_bits" not in found:
        return f"{head} · {found['narrow']:.0f} narrow"
    per = found.get("instructions_per_element")
    tail = "loop" if per is None else f"{per:.1f}"
    return f"{head} · {found['load_bits']:.0f}/{found['store_bits']:.0f} · {tail}"


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw a roofline for each place: elements a second over elements a byte moved.

    The line is what the bare copy of the same run allows; a point is an operation on a shape. Kinds
    that move as many bytes stand beside each other, around their tick.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    places = list(dict.fromkeys(point.place for point in points)) or ["nothing measured"]
    figure, panels = pyplot.subplots(
        1, len(places), figsize=(9 * len(places), 6), squeeze=False, layout="constrained"
    )
    for place, panel in zip(places, panels[0], strict=True):
        mine = [point for point in points if point.place == place]
        panel.set(
            title=f"{place}: bf16 elements a second",
            xlabel="elements a byte of memory read or written",
            ylabel="G elements/s",
            xscale="log",
            yscale="log",
        )
        if not mine:
            continue
        top = spread([point.roof for point in mine]).p50
        low, high = (edge(1 / point.moved for point in mine) for edge in (min, max))
        line = np.array([low / 2, high * 2])
        panel.plot(line, line * top / 1e9, color="black", label=f"copy roof {top / 1e9:.1f} GB/s")
        kinds = {kind_of(point): point.moved for point in mine}
        for kind, moved in kinds.items():
            chosen = [point for point in mine if kind_of(point) == kind]
            beside = [each for each in kinds if kinds[each] == moved]  # a column for each of them
            shift = 1.03 ** (beside.index(kind) - (len(beside) - 1) / 2)
            panel.scatter(
                [shift / point.moved for point in chosen],
                [point.speed / 1e9 for point in chosen],
                label=kind,
                alpha=0.7,
            )
        ticks = sorted({point.moved for point in mine})
        panel.set_xticks([1 / moved for moved in ticks], [f"1/{moved:.3g}" for moved in ticks])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        panel.grid(True, which="both", alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def kind_of(point: Point) -> str:
    """The operation and encoding of a point, without its shape."""
    return " ".join(point.case.split(" ")[1:3])
