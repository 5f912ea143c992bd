"""How a block's K/V becomes a frame's payload, and back, a table at a time.

The encoding stands in the frame's header: `raw` and `lossless` hold equal content, so they answer
the same key. A lossy codec is a fidelity of its own and part of the identity. A namespace has
`Forms`: what most of its blocks are saved as, what the first block of a prompt is, and what a block
becomes that its codec has found no room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvengine import frame
from kvengine.cache import PagedCache
from kvengine.errors import LayoutError
from kvengine.kernels import copy, launch, lossless, quant, rows
from kvengine.kernels.copy import Moves, Span
from kvengine.kernels.rows import Rows
from kvengine.layout import Layout

Range = Span
Int64s = NDArray[np.int64]
Table = Moves | Rows
One = TypeVar("One")
Other = TypeVar("Other")
EXACT = "exact"


class Codec(Protocol):
    """Encode on save, decode and verify on load, for one layout.

    Calls release the GIL where numba is installed. Every frame of a codec has the same size: a
    codec whose rate is not fixed reserves what it may take at most, and calls what does not fit
    OVERFULL.
    """

    @property
    def encoding(self) -> int:
        """The number in the frame's header."""
        ...

    @property
    def fidelity(self) -> str:
        """What stands in the identity: EXACT, or the lossy codec with its parameters."""
        ...

    @property
    def segment_bytes(self) -> NDArray[np.uint64]:
        """Bytes of each encoded segment, in the order of the payload."""
        ...

    def cut(self, layers: int) -> Codec:
        """Return the same codec for so many layers of each block, one after another."""
        ...

    def table(
        self,
        cache: PagedCache,
        frames: Int64s,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
    ) -> Table:
        """Describe a table of blocks as this codec takes it. frames: address of each payload."""
        ...

    def encode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Fill frames from the caller's cache.

        Write the digests of the encoded segments, uint64[blocks, segments, 2], and for each
        GOOD, or OVERFULL where it does not fit: then its block is saved in the spare form.
        """
        ...

    def decode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify segments and fill the caller's cache; write GOOD or BAD for each."""
        ...


@dataclass(frozen=True, slots=True)
class Forms(Generic[One]):
    """What a namespace's blocks may be saved as: codecs, or something for each codec.

    usual: most blocks. first: the first block of a prompt. spare: a block that is OVERFULL.
    """

    usual: One
    first: One
    spare: One | None = None

    def __iter__(self) -> Iterator[One]:
        """Give each one once, the usual one first."""
        given = (self.usual, self.first, self.spare)
        yield from dict.fromkeys(each for each in given if each is not None)

    def map(self, function: Callable[[One], Other]) -> Forms[Other]:
        """Call the function once for each one."""
        made = {each: function(each) for each in self}
        spare = None if self.spare is None else made[self.spare]
        return Forms(made[self.usual], made[self.first], spare)


def forms_of(fidelity: str, layout: Layout, *, smaller: bool = True) -> Forms[Codec]:
    """Return the codecs of a fidelity: "exact", or the name of a lossy codec, parameters or none.

    They are for one part of the layout's blocks: each is encoded by itself. smaller: whether exact
    blocks are saved as `lossless` where that pays; if not they are saved as they are, and those
    that another has saved so are read all the same. Raises LayoutError for an unknown fidelity, and
    for a layout that it cannot take.
    """
    layout = layout.part_layout
    if fidelity == EXACT:
        raw: Codec = Raw(layout)
        if not Lossless.pays(layout):
            return Forms(raw, raw)
        coded: Codec = Lossless(layout)
        return Forms(coded, coded, raw) if smaller else Forms(raw, raw, coded)
    scheme = fidelity.partition(" ")[0]
    if scheme not in quant.SCHEMES or fidelity not in (scheme, QUANTISED[scheme][1]):
        known = ", ".join((EXACT, *quant.SCHEMES))
        raise LayoutError(f"fidelity {fidelity!r} is not known, expected one of {known}")
    usual: Codec = Quantised(layout, scheme)
    # The first tokens of a prompt draw attention from all others: they keep 8 bits or all of them.
    return Forms(usual, Quantised(layout, "int8") if scheme in FOUR_BITS else Raw(layout))


class Raw:
    """The caller's bytes as they are."""

    encoding = frame.ENCODING_RAW
    fidelity = EXACT

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.segment_bytes = np.full(layout.layers, layout.segment_bytes, dtype=np.uint64)

    def cut(self, layers: int) -> Codec:
        """Cut."""
        return Raw(replace(self._layout, layers=layers))

    def table(
        self,
        cache: PagedCache,
        frames: Int64s,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
    ) -> Moves:
        """Describe runs of bytes."""
        return cache.moves(frames, block_table, slot_mapping)

    def encode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Copy and digest in one pass."""
        assert isinstance(table, Moves)
        copy.gather(table, blocks, segments, digests)
        verdicts[slice(*blocks), slice(*segments)] = copy.GOOD

    def decode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify and copy in one pass."""
        assert isinstance(table, Moves)
        copy.scatter(table, blocks, segments, digests, verdicts)


class Coded:
    """Frames whose components are coded apart: how such a payload is laid out.

    parts: bytes of each encoded component of a layer.
    """

    def __init__(self, parts: list[int], layers: int) -> None:
        self.segment_bytes = np.full(layers, sum(parts), dtype=np.uint64)
        starts = np.cumsum([0, *parts * layers]).astype(np.int64)
        first = np.arange(layers, dtype=np.int64) * len(parts)
        counts = np.full_like(first, len(parts))
        columns = (first, counts, starts[first], np.full_like(first, sum(parts)))
        self._places, self._segments = starts[:-1], np.stack(columns, axis=1)

    def table(
        self,
        cache: PagedCache,
        frames: Int64s,
        block_table: Int64s | None,
        slot_mapping: Int64s | None,
    ) -> Rows:
        """Describe rows, one for each head of each token."""
        return cache.rows(frames, block_table, slot_mapping, self._places, self._segments)


class Lossless(Coded):
    """Exponents coded in 3 bits, equal content in three quarters: see kvengine.kernels.lossless."""

    encoding = frame.ENCODING_LOSSLESS
    fidelity = EXACT

    def __init__(self, layout: Layout) -> None:
        assert self.pays(layout)
        self._layout = layout
        parts = [
            lossless.encoded_nbytes(layout.block_tokens, layout.kv_heads * dim)
            for dim in layout.head_dims
        ]
        super().__init__(parts, layout.layers)

    def cut(self, layers: int) -> Codec:
        """Cut."""
        return Lossless(replace(self._layout, layers=layers))

    @staticmethod
    def pays(layout: Layout) -> bool:
        """Tell whether it fits the layout, and each component gets smaller by an eighth or more."""
        return layout.dtype == "bfloat16" and all(
            dim % lossless.GROUP == 0 and lossless.pays(layout.block_tokens, layout.kv_heads * dim)
            for dim in layout.head_dims
        )

    def encode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Code and digest in one pass; a segment is OVERFULL where exponents are far apart."""
        assert isinstance(table, Rows)
        lossless.encode(table, blocks, segments, digests, verdicts)

    def decode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify and decode in one pass."""
        assert isinstance(table, Rows)
        lossless.decode(table, blocks, segments, digests, verdicts)


# Raise a scheme's version when its bytes change: blocks of another are other blocks.
QUANTISED = {
    "int8": (frame.ENCODING_INT8, "int8 v2 keys=channel values=row first=exact"),
    "fp8": (frame.ENCODING_FP8, "fp8 v1 e4m3 scale=row first=exact"),
    "int4": (frame.ENCODING_INT4, "int4 v1 keys=channel values=group first=int8"),
    "rot4": (frame.ENCODING_ROT4, "rot4 v1 first=int8"),
}
FOUR_BITS = ("int4", "rot4")


class Quantised(Coded):
    """Codes of 8 or 4 bits and their scales: see kvengine.kernels.quant."""

    def __init__(self, layout: Layout, scheme: str) -> None:
        if layout.is_opaque or layout.dtype not in rows.ITEM_BYTES:
            given = "opaque pages" if layout.is_opaque else layout.dtype
            raise LayoutError(
                f"fidelity {scheme!r} of {given}, expected a layout of "
                f"{', '.join(rows.ITEM_BYTES)}: ask for 'exact'"
            )
        for dim in layout.head_dims:
            if wrong := quant.fits(scheme, dim):
                raise LayoutError(f"fidelity {scheme!r}: {wrong}; ask for 'int8' or 'exact'")
        launch.load_quantizer(scheme)  # where the caller waits, and no thread is half-way in a fork
        self._layout, self._scheme = layout, scheme
        self.encoding, self.fidelity = QUANTISED[scheme]
        parts = [
            sum(quant.planes(scheme, layout.kv_heads, layout.block_tokens, dim, part == 0))
            for part, dim in enumerate(layout.head_dims)
        ]
        super().__init__(parts, layout.layers)

    def cut(self, layers: int) -> Codec:
        """Cut."""
        return Quantised(replace(self._layout, layers=layers), self._scheme)

    def encode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Quantise, then digest what the frames hold."""
        assert isinstance(table, Rows)
        quant.encode(self._scheme, table, blocks, segments, digests)
        verdicts[slice(*blocks), slice(*segments)] = copy.GOOD

    def decode(
        self,
        table: Table,
        blocks: Range,
        segments: Range,
        digests: NDArray[np.uint64],
        verdicts: NDArray[np.uint8],
    ) -> None:
        """Verify what the frames hold, then give values back."""
        assert isinstance(table, Rows)
        quant.decode(self._scheme, table, blocks, segments, digests, verdicts)
