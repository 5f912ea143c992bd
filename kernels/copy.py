"""Copy blocks between a paged cache and frames, and digest or verify every segment on the way.

One `Moves` says where all bytes of a table of blocks lie: each layer, K and V, each block. `gather`
fills frames from the cache, `scatter` fills the cache from frames. Both take ranges of blocks and
segments, so that several threads share one Moves. Three ways give the same bytes: the compiled path
(`native.py`, one pass over the bytes), the plain one here, and the references at the end; for a
device, `device.py` has the raw copy. Called by the engine's transfers.
"""

import ctypes
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvengine.kernels.digest import digest
from kvengine.kernels.launch import choose

# columns of Moves.components
BASE, GROUP, OUTER, OUTER_CACHE, OUTER_FRAME = range(5)
INNER, INNER_CACHE, INNER_FRAME, RUN, UNIT_FRAME, FRAME = range(5, 11)
COLUMNS = 11
# columns of Moves.segments
FIRST, COUNT, OFFSET, NBYTES = range(4)

GOOD, BAD, OVERFULL = 1, 2, 3  # verdicts; the last is of codecs whose rate is not fixed

# A call that moves more than this writes past the caches: what it wrote first would be evicted
# before the call ends, and a line written past them is not read from memory first.
STREAM_NBYTES = 4 << 20

Int64s = npt.NDArray[np.int64]
Span = tuple[int, int]


class Table(Protocol):
    """What tables of a frame's bytes have in common, `Moves` and `rows.Rows`."""

    @property
    def segments(self) -> Int64s: ...

    @property
    def frames(self) -> Int64s: ...

    @property
    def block_nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Moves:
    """Say where every byte of a table of N blocks lies, in the cache and in frames.

    components: int64[C, 11], columns BASE (address in the cache), GROUP (row of `offsets`), OUTER
        and INNER (counts), their strides in the cache and in the frame, RUN, UNIT_FRAME (stride of
        a unit in the frame), FRAME (offset in the frame's payload); bytes but for the counts.
    offsets: int64[G, N, U], byte offset of unit u of block n from BASE. U is 1 for whole blocks of
        a paged cache, the tokens of a block for a slot mapping.
    segments: int64[S, 4], first component, count of components, offset in the payload, nbytes.
    frames: int64[N], address of each frame's payload.
    whole: whether components tile their segments. Those of a few heads do not: `scatter` verifies
        the whole segments and copies what there is, `gather` refuses to leave a frame half-filled.

    Run (a, b) of unit u of component c of block n is RUN bytes at
        cache: BASE + offsets[GROUP, n, u] + a * OUTER_CACHE + b * INNER_CACHE
        frame: frames[n] + FRAME + u * UNIT_FRAME + a * OUTER_FRAME + b * INNER_FRAME
    Addresses are not checked, and whoever made them keeps the memory alive. All tables are
    C-contiguous. Raises ValueError for a table of the wrong dtype or shape.
    """

    components: Int64s
    offsets: Int64s
    segments: Int64s
    frames: Int64s
    whole: bool = True
    short_nbytes: int = field(init=False)  # of the shortest segment
    block_nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        expect("components", self.components, np.int64, (None, COLUMNS))
        expect("segments", self.segments, np.int64, (None, 4))
        expect("frames", self.frames, np.int64, (None,))
        expect("offsets", self.offsets, np.int64, (None, len(self.frames), None))
        nbytes = self.segments[:, NBYTES]
        object.__setattr__(self, "short_nbytes", int(nbytes.min(initial=1 << 62)))
        object.__setattr__(self, "block_nbytes", int(nbytes.sum()))

    def check(self) -> None:
        """Raise ValueError unless segments lie apart and their components tile them in order.

        Every component covers one stretch of the frame, each starting where the one before ends;
        where the table is not `whole`, each lies within its segment. Called once for each layout:
        `gather` and `scatter` rely on it and do not look again.
        """
        groups, _, units = self.offsets.shape
        end = 0
        for s in np.argsort(self.segments[:, OFFSET], kind="stable").tolist():
            first, count, offset, nbytes = self.segments[s].tolist()
            if first < 0 or count < 1 or first + count > len(self.components):
                raise ValueError(
                    f"segment {s} has components {first} to {first + count}, "
                    f"expected one or more of {len(self.components)}"
                )
            if offset < end:
                raise ValueError(f"segment {s} starts at byte {offset}, inside another: {end}")
            at = offset
            for c in range(first, first + count):
                row = self.components[c].tolist()
                if not 0 <= row[GROUP] < groups:
                    raise ValueError(f"component {c} has group {row[GROUP]}, expected 0..{groups}")
                if not self.whole:
                    _expect_within(c, row, units, (offset, offset + nbytes))
                    continue
                if row[FRAME] != at:
                    raise ValueError(f"component {c} starts at byte {row[FRAME]}, expected {at}")
                at += _tile(c, row, units)
            end = offset + nbytes
            if self.whole and at != end:
                raise ValueError(f"segment {s} has {nbytes} bytes, its components {at - offset}")


def gather(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    *,
    native: bool | None = None,
) -> None:
    """Copy cache -> frames, and write the digest of each segment.

    blocks, segments: (first, last) ranges of `moves`, last excluded; only their bytes and rows are
    written. digests: uint64[N, S, 2], (low, high). With numba the interpreter's lock is released
    for the whole call and other threads may gather other ranges. `native=False` is the plain path.
    Raises ValueError for a range or table that does not fit, ImportError for native=True without
    numba.
    """
    expect_whole(moves)
    expect_ranges(moves, blocks, segments)
    expect_status(moves, digests)
    compiled = choose(native)
    if compiled is None or moves.short_nbytes <= compiled.SHORT_NBYTES:
        _gather_plain(moves, blocks, segments, digests)
        return
    tables = (moves.components, moves.offsets, moves.segments, moves.frames)
    compiled.gather(*tables, *blocks, *segments, digests, streams(moves, blocks, segments))


def scatter(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
    *,
    native: bool | None = None,
) -> None:
    """Copy frames -> cache, and write a verdict on each segment: GOOD or BAD.

    digests: uint64[N, S, 2], what each segment's digest must be; verdicts: uint8[N, S]. What is
    hashed is what is written; where a segment is BAD its bytes in the cache may be the old ones,
    the wrong ones, or both: not to be used. A table that is not `whole` is read twice, segment by
    segment, and nothing of a BAD one is copied. Otherwise as `gather`.
    """
    expect_ranges(moves, blocks, segments)
    expect_status(moves, digests, verdicts)
    compiled = choose(native)
    if compiled is None or moves.short_nbytes <= compiled.SHORT_NBYTES:
        _scatter_plain(moves, blocks, segments, digests, verdicts)
        return
    tables = (moves.components, moves.offsets, moves.segments, moves.frames)
    if not moves.whole:
        compiled.scatter_some(*tables, *blocks, *segments, digests, verdicts)
        return
    past = streams(moves, blocks, segments)
    compiled.scatter(*tables, *blocks, *segments, digests, verdicts, past)


def copy_spans(
    sources: Int64s, targets: Int64s, nbytes: Int64s, *, native: bool | None = None
) -> None:
    """Copy nbytes[i] bytes from address sources[i] to targets[i], span by span.

    sources, targets, nbytes: int64[n]; spans do not overlap. Without the interpreter's lock, with
    numba for the whole call; `swap_device.py` does the same on a device. Raises ValueError for
    tables that do not fit and for sizes below 0.
    """
    expect_spans(sources, targets, nbytes)
    compiled = choose(native)
    if compiled is not None:
        compiled.copy_spans(sources, targets, nbytes)
        return
    for source, target, size in zip(
        sources.tolist(), targets.tolist(), nbytes.tolist(), strict=True
    ):
        ctypes.memmove(target, source, size)


def expect_spans(sources: Int64s, targets: Int64s, nbytes: Int64s) -> None:
    """Raise ValueError unless the three tables fit each other."""
    for name, table in (("sources", sources), ("targets", targets), ("nbytes", nbytes)):
        expect(name, table, np.int64, (len(nbytes),))
    if len(nbytes) and int(nbytes.min()) < 0:
        raise ValueError(f"a span of {int(nbytes.min())} bytes, expected 0 or more")


def gather_reference(
    moves: Moves, blocks: Span, segments: Span, digests: npt.NDArray[np.uint64]
) -> None:
    """Do what `gather` does, one run at a time."""
    for n, s, frame, nbytes in listed(moves, blocks, segments):
        for cache, at, run in _runs(moves, n, s):
            bytes_at(at, run)[:] = bytes_at(cache, run)
        digests[n, s] = digest(frame, nbytes)


def scatter_reference(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    """Do what `scatter` does, one run at a time; leave the cache alone where a segment is BAD."""
    for n, s, frame, nbytes in listed(moves, blocks, segments):
        good = digest(frame, nbytes) == tuple(digests[n, s].tolist())
        verdicts[n, s] = GOOD if good else BAD
        if good:
            for cache, at, run in _runs(moves, n, s):
                bytes_at(cache, run)[:] = bytes_at(at, run)


def _gather_plain(
    moves: Moves, blocks: Span, segments: Span, digests: npt.NDArray[np.uint64]
) -> None:
    for n, s, frame, nbytes in listed(moves, blocks, segments):
        for cache, at in _units(moves, n, s):
            at[:] = cache
        digests[n, s] = digest(frame, nbytes)


def _scatter_plain(
    moves: Moves,
    blocks: Span,
    segments: Span,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8],
) -> None:
    for n, s, frame, nbytes in listed(moves, blocks, segments):
        good = digest(frame, nbytes) == tuple(digests[n, s].tolist())
        verdicts[n, s] = GOOD if good else BAD
        if good:
            for cache, at in _units(moves, n, s):
                cache[:] = at


def listed(table: Table, blocks: Span, segments: Span) -> list[tuple[int, int, int, int]]:
    """List (block, segment, its address in the frame, its nbytes)."""
    frames, rows = table.frames.tolist(), table.segments.tolist()
    return [
        (n, s, frames[n] + rows[s][OFFSET], rows[s][NBYTES])
        for n in range(*blocks)
        for s in range(*segments)
    ]


def _runs(moves: Moves, n: int, s: int) -> list[tuple[int, int, int]]:
    """List (address in the cache, address in the frame, nbytes) of each run of a segment."""
    first, count = moves.segments[s, :2].tolist()
    frame = int(moves.frames[n])
    return [
        (
            row[BASE] + offset + a * row[OUTER_CACHE] + b * row[INNER_CACHE],
            frame + row[FRAME] + u * row[UNIT_FRAME] + a * row[OUTER_FRAME] + b * row[INNER_FRAME],
            row[RUN],
        )
        for row in moves.components[first : first + count].tolist()
        for u, offset in enumerate(moves.offsets[row[GROUP], n].tolist())
        for a in range(row[OUTER])
        for b in range(row[INNER])
    ]


def _units(
    moves: Moves, n: int, s: int
) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """List (in the cache, in the frame) each unit of a segment: uint8[OUTER, INNER, RUN]."""
    first, count = moves.segments[s, :2].tolist()
    frame = int(moves.frames[n])
    found = []
    for row in moves.components[first : first + count].tolist():
        shape = (row[OUTER], row[INNER], row[RUN])
        for u, offset in enumerate(moves.offsets[row[GROUP], n].tolist()):
            at = frame + row[FRAME] + u * row[UNIT_FRAME]
            cache = Memory(row[BASE] + offset, shape, (row[OUTER_CACHE], row[INNER_CACHE], 1))
            target = Memory(at, shape, (row[OUTER_FRAME], row[INNER_FRAME], 1))
            found.append((np.asarray(cache), np.asarray(target)))
    return found


class Memory:
    """Unsigned words of `item` bytes at an address, as numpy takes them."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, item: int = 1
    ) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": f"<u{item}" if item > 1 else "|u1",
            "version": 3,
        }


def bytes_at(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """View bytes at an address."""
    return np.asarray(Memory(address, (nbytes,), None))


def _tile(c: int, row: list[int], units: int) -> int:
    """Return the bytes that component c covers; ValueError where it leaves a gap or overlaps."""
    axes = (
        (row[UNIT_FRAME], units, "unit"),
        (row[OUTER_FRAME], row[OUTER], "outer"),
        (row[INNER_FRAME], row[INNER], "inner"),
    )
    covered = row[RUN]
    for stride, count, name in sorted(axis for axis in axes if axis[1] != 1):
        if count < 1:
            raise ValueError(f"component {c} has {count} {name} runs, expected at least 1")
        if stride != covered:
            raise ValueError(
                f"component {c} has {name} stride {stride} in the frame, expected {covered}"
            )
        covered *= count
    if covered < 1:
        raise ValueError(f"component {c} has runs of {row[RUN]} bytes, expected at least 1")
    return covered


def _expect_within(c: int, row: list[int], units: int, segment: Span) -> None:
    """Raise ValueError unless all runs of a component lie within its segment."""
    reach = [
        (max(0, count) - 1) * stride
        for count, stride in (
            (units, row[UNIT_FRAME]),
            (row[OUTER], row[OUTER_FRAME]),
            (row[INNER], row[INNER_FRAME]),
        )
    ]
    first, last = row[FRAME], row[FRAME] + sum(reach) + row[RUN]
    if min(reach) < 0 or row[RUN] < 1 or first < segment[0] or last > segment[1]:
        raise ValueError(
            f"component {c} reaches from byte {first} to {last}, expected runs within "
            f"{segment[0]} to {segment[1]}"
        )


def expect_whole(moves: Moves) -> None:
    """Raise ValueError for a table that would leave frames half-filled."""
    if not moves.whole:
        raise ValueError("a table of a few heads was given to fill frames: give one of all heads")


def expect_ranges(table: Table, blocks: Span, segments: Span) -> None:
    """Raise ValueError for ranges that are not within a table."""
    for name, (first, last), count in (
        ("blocks", blocks, len(table.frames)),
        ("segments", segments, len(table.segments)),
    ):
        if not 0 <= first <= last <= count:
            raise ValueError(f"{name} {first} to {last} are not within the {count} of the table")


def expect_status(
    table: Table,
    digests: npt.NDArray[np.uint64],
    verdicts: npt.NDArray[np.uint8] | None = None,
) -> None:
    """Raise ValueError unless there is a digest, and a verdict, for each segment of a table."""
    shape = (len(table.frames), len(table.segments))
    expect("digests", digests, np.uint64, (*shape, 2))
    if verdicts is not None:
        expect("verdicts", verdicts, np.uint8, shape)


def streams(table: Table, blocks: Span, segments: Span) -> bool:
    """Tell whether a call moves so much that it writes past the caches."""
    share = (segments[1] - segments[0]) / max(len(table.segments), 1)
    return (blocks[1] - blocks[0]) * table.block_nbytes * share > STREAM_NBYTES


def expect(
    name: str, table: npt.NDArray[np.generic], dtype: type, shape: tuple[int | None, ...]
) -> None:
    """Raise ValueError unless `table` is C-contiguous, of this dtype and shape (None: any size)."""
    fits = table.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(table.shape, shape, strict=False)
    )
    if not fits or table.dtype != dtype or not table.flags.c_contiguous:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} is {table.dtype}{list(table.shape)}, "
            f"expected C-contiguous {np.dtype(dtype)}[{wanted}]"
        )
