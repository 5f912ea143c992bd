"""Frames to frames: another order of axes, or another degree of tensor parallelism.

A frame holds each layer's K and V (or one latent) as [tokens, heads, dim] (NHD) or [heads, tokens,
dim] (HND), of all heads of a block or of a part of them. `relayout` describes the way between wide
frames and the narrow ones that hold the same heads as one `copy.Moves`, so that the kernels that
move blocks move these too: `gather` splits (and digests what it writes), `scatter` merges (and
verifies what it reads). With as many heads on both sides only the order changes. To read parts of
another degree into a paged cache needs none of this: the cache's strides say where heads go.
"""

from dataclasses import dataclass

import numpy as np

from kvengine.kernels.copy import COLUMNS, Int64s, Moves, expect

ORDERS = ("NHD", "HND")


@dataclass(frozen=True, slots=True)
class Form:
    """How the heads of a block lie in a frame.

    order: "NHD" or "HND". layers: of the frame. tokens: of a block. heads: of the frame. rows: the
    bytes of one head of one token, for K and V, or for the one latent. Raises ValueError for what
    is no such frame.
    """

    order: str
    layers: int
    tokens: int
    heads: int
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r}, expected one of {', '.join(ORDERS)}")
        if min(self.layers, self.tokens, self.heads, *self.rows) < 1:
            raise ValueError(f"{self}: every count and size is at least 1")

    @property
    def segment_bytes(self) -> int:
        """Bytes of a layer."""
        return self.tokens * self.heads * sum(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of a frame's payload."""
        return self.layers * self.segment_bytes

    def strides(self, row: int) -> tuple[int, int]:
        """Return the bytes from one token to the next, and from one head to the next."""
        return (self.heads * row, row) if self.order == "NHD" else (row, self.tokens * row)


def relayout(wide: Form, narrow: Form, wide_frames: Int64s, narrow_frames: Int64s) -> Moves:
    """Describe the way between N wide frames and the N x P narrow ones of the same blocks.

    wide_frames: int64[N], addresses; narrow_frames: int64[N, P], in the order of their heads, where
    P x narrow.heads = wide.heads. The `frames` of the result are the narrow ones, block by block,
    its segments their layers. Called with `gather` it splits, with `scatter` it merges, by any of
    the kernels' ways. Raises ValueError for forms that hold other bytes and tables that do not fit.
    """
    parts, rest = divmod(wide.heads, narrow.heads)
    if rest or (wide.layers, wide.tokens, wide.rows) != (narrow.layers, narrow.tokens, narrow.rows):
        raise ValueError(
            f"frames of {narrow} are no parts of {wide}: expected the same layers, tokens and "
            "rows, and a number of heads that divides the other"
        )
    count = len(wide_frames)
    expect("wide_frames", wide_frames, np.int64, (count,))
    expect("narrow_frames", narrow_frames, np.int64, (count, parts))
    components, offsets = [], []
    for layer in range(wide.layers):
        for number, row in enumerate(wide.rows):
            before = sum(wide.rows[:number]) * wide.tokens
            source = layer * wide.segment_bytes + before * wide.heads
            target = layer * narrow.segment_bytes + before * narrow.heads
            components.append((source, number, *_axes(wide, narrow, row), target))
    for row in wide.rows:
        first = np.arange(parts) * narrow.heads * wide.strides(row)[1]
        offsets.append((wide_frames[:, None] + first).reshape(-1, 1))
    nbytes = narrow.segment_bytes
    each = len(wide.rows)
    segments = [(layer * each, each, layer * nbytes, nbytes) for layer in range(wide.layers)]
    return Moves(
        np.array(components, np.int64).reshape(-1, COLUMNS),
        np.array(offsets, np.int64),
        np.array(segments, np.int64),
        np.ascontiguousarray(narrow_frames).reshape(-1),
    )


def relayout_reference(wide: Form, narrow: Form, blocks: np.ndarray) -> np.ndarray:
    """Split wide payloads: uint8[N, wide.nbytes] -> uint8[N, P, narrow.nbytes]."""
    parts = wide.heads // narrow.heads
    found = np.zeros((len(blocks), parts, narrow.nbytes), np.uint8)
    for n, part in np.ndindex(found.shape[:2]):
        pieces = []
        for layer in blocks[n].reshape(wide.layers, -1):
            at = 0
            for row in wide.rows:
                size = wide.tokens * wide.heads * row
                piece = layer[at : at + size]
                at += size
                if wide.order == "NHD":
                    piece = piece.reshape(wide.tokens, wide.heads, row).swapaxes(0, 1)
                piece = piece.reshape(wide.heads, wide.tokens, row)
                piece = piece[part * narrow.heads : (part + 1) * narrow.heads]
                pieces.append(piece if narrow.order == "HND" else piece.swapaxes(0, 1))
        found[n, part] = np.concatenate([piece.reshape(-1) for piece in pieces])
    return found


def _axes(wide: Form, narrow: Form, row: int) -> tuple[int, ...]:
    """Return (outer, its strides, inner, its strides, run, unit stride) of a component."""
    tokens, heads = wide.tokens, narrow.heads
    (wide_token, wide_head), (token, head) = wide.strides(row), narrow.strides(row)
    axes = [(tokens, wide_token, token), (heads, wide_head, head)]
    axes.sort(key=lambda axis: -axis[2])  # the outer one first
    run = row
    while axes and (axes[-1][0] == 1 or axes[-1][1] == axes[-1][2] == run):
        run *= axes.pop()[0]  # it touches its neighbours on both sides
    axes = [(1, 0, 0)] * (2 - len(axes)) + axes
    return (*axes[0], *axes[1], run, 0)
