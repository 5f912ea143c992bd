"""Where the rows of a table of blocks lie: what every codec but the raw copy is told.

A row is the elements of one head of one token: they lie compact in the cache. A component is K, V
or the latent of one layer. Frames hold a component's encoded form in one stretch, head by head and
token by token whatever the order of the axes in the cache is, so that a range of heads is a range
of bytes of each plane. Called by codecs; the tables are made by `kvengine.cache`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvengine.kernels.copy import Memory, Span, expect

# columns of Rows.components
BASE, GROUP, TOKEN_CACHE, HEAD_CACHE, HEADS, DIM, KEYS, FRAME = range(8)
COLUMNS = 8
# columns of Rows.segments, as of Moves.segments
FIRST, COUNT, OFFSET, NBYTES = range(4)

# Bytes of an element of each dtype whose values codecs know.
ITEM_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
ALL_HEADS = (0, 1 << 16)  # no component has more

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Say where every row of a table of N blocks lies in the cache, and its codes in frames.

    components: int64[C, 8], columns BASE (address in the cache), GROUP (row of `offsets`),
        TOKEN_CACHE and HEAD_CACHE (strides in bytes), HEADS, DIM (elements of a row), KEYS (1 for
        keys and latents, 0 for values), FRAME (offset of the encoded component in the payload).
    offsets: int64[G, N, U], byte offset of block n from BASE. U is 1 for whole blocks of a paged
        cache, `tokens` for a slot mapping: then each token has its own and TOKEN_CACHE is 0.
    segments: int64[S, 4], first component, count of components, offset in the payload, nbytes.
    frames: int64[N], address of each frame's payload: a multiple of 16, as FRAME and OFFSET are.
    tokens: of a block. dtype: one of ITEM_BYTES.
    heads: (first, last) of those that the cache has, last excluded: a frame has all HEADS, verified
        together, and those are decoded. Frames are made of all heads only.

    The row of head h of token t of component c of block n begins at
        BASE + offsets[GROUP, n, t if U > 1 else 0] + t * TOKEN_CACHE + (h - first) * HEAD_CACHE
    Addresses are not checked, and whoever made them keeps the memory alive. All tables are
    C-contiguous. Raises ValueError for a table of the wrong dtype or shape, TypeError for an
    unknown dtype.
    """

    components: Int64s
    offsets: Int64s
    segments: Int64s
    frames: Int64s
    tokens: int
    dtype: str
    heads: Span = ALL_HEADS
    block_nbytes: int = field(init=False)  # of the caller's elements

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise TypeError(f"elements of {self.dtype}: codecs know {known}; copy them as they are")
        expect("components", self.components, np.int64, (None, COLUMNS))
        expect("segments", self.segments, np.int64, (None, 4))
        expect("frames", self.frames, np.int64, (None,))
        expect("offsets", self.offsets, np.int64, (None, len(self.frames), None))
        if self.offsets.shape[2] not in (1, self.tokens):
            raise ValueError(
                f"offsets of {self.offsets.shape[2]} units a block, expected 1 or {self.tokens}"
            )
        first, last = self.heads
        most = int(self.components[:, HEADS].min(initial=last))
        if not 0 <= first < last or (last > most and self.heads != ALL_HEADS):
            raise ValueError(f"heads {first} to {last} are not within the {most} of the rows")
        elements = int((self.counts * self.components[:, DIM]).sum()) * self.tokens
        object.__setattr__(self, "block_nbytes", elements * self.item_bytes)

    @property
    def counts(self) -> Int64s:
        """How many heads of each component the cache has."""
        first, last = self.heads
        found: Int64s = np.minimum(self.components[:, HEADS], last) - first
        return found

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return ITEM_BYTES[self.dtype]

    def expect_whole(self) -> None:
        """Raise ValueError for a table that would leave frames half-filled."""
        if (self.counts < self.components[:, HEADS]).any():
            raise ValueError(
                f"heads {self.heads[0]} to {self.heads[1]} were given to fill frames of "
                f"{int(self.components[:, HEADS].max())}: give a cache of all heads"
            )

    def alignment(self, components: Int64s, offsets: Int64s) -> int:
        """Return the bytes, 16 at most and a power of two, that divide every row's address."""
        columns = components[:, [BASE, TOKEN_CACHE, HEAD_CACHE]]
        return math.gcd(16, *(int(np.gcd.reduce(each, axis=None)) for each in (columns, offsets)))

    def words(self, block: int, component: int) -> npt.NDArray[np.unsignedinteger]:
        """Copy a component's elements out of the cache, as words [heads, tokens, dim]."""
        views = self._views(block, component)
        return views[0].copy() if len(views) == 1 else np.concatenate(views, axis=1)

    def put(self, block: int, component: int, words: npt.NDArray[np.unsignedinteger]) -> None:
        """Copy a component's elements, words [all heads, tokens, dim], to those that it has."""
        at, words = 0, words[slice(*self.heads)]
        for view in self._views(block, component):
            view[...] = words[:, at : at + view.shape[1]]
            at += view.shape[1]

    def _views(self, block: int, component: int) -> list[npt.NDArray[np.unsignedinteger]]:
        """View a component in the cache: [heads, tokens, dim], or one [heads, 1, dim] a token."""
        row, heads = self.components[component].tolist(), int(self.counts[component])
        offsets = self.offsets[row[GROUP], block].tolist()
        count = self.tokens // len(offsets)
        return [
            np.asarray(
                Memory(
                    row[BASE] + offset,
                    (heads, count, row[DIM]),
                    (row[HEAD_CACHE], row[TOKEN_CACHE], self.item_bytes),
                    self.item_bytes,
                )
            )
            for offset in offsets
        ]
