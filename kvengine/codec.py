"""How a block's K/V becomes a frame's payload, and back, a table at a time.

The encoding stands in the frame's header only: `raw` and (later) `lossless` hold equal content, so
they answer the same key. A lossy codec is a fidelity of its own and part of the identity.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvengine import frame
from kvengine.kernels import copy
from kvengine.kernels.copy import Moves

Range = tuple[int, int]


class Codec(Protocol):
    """Encode on save, decode and verify on load. Calls release the GIL where numba is installed."""

    @property
    def encoding(self) -> int:
        """The number in the frame's header."""
        ...

    def encode(
        self, moves: Moves, blocks: Range, segments: Range, digests: NDArray[np.uint64]
    ) -> None:
        """Fill frames from the caller's cache; write digests, uint64[blocks, segments, 2]."""
        ...

    def decode(
        self,
        moves: Moves,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify segments and fill the caller's cache; write copy.GOOD or copy.BAD for each."""
        ...


class Raw:
    """The caller's bytes as they are."""

    encoding = frame.ENCODING_RAW

    def encode(
        self, moves: Moves, blocks: Range, segments: Range, digests: NDArray[np.uint64]
    ) -> None:
        """Copy and digest in one pass."""
        copy.gather(moves, blocks, segments, digests)

    def decode(
        self,
        moves: Moves,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify and copy in one pass."""
        copy.scatter(moves, blocks, segments, digests, verdicts)
