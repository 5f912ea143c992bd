"""What a namespace's blocks look like in a slot: in which codec, and where each part's frame is.

A block has one slot. Its parts are frames of one size at fixed places in it: whoever has a part's
number knows where it is, and what moves a block moves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvengine.codec import Codec
from kvengine.frame import FILL, Template, block_bytes, pages
from kvengine.layout import Layout, View

Memory = Callable[[int, int], memoryview]  # a slot's first bytes


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """One kind of frame of a namespace. `templates` are of its parts, `codec` encodes each alone.

    `number` is what the store calls blocks of this size.
    """

    number: int
    codec: Codec
    templates: tuple[Template, ...]

    @property
    def template(self) -> Template:
        """That of the first part: all are of one size."""
        return self.templates[0]

    @property
    def step(self) -> int:
        """Bytes from the start of a part to that of the next."""
        return pages(self.template.frame_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return block_bytes(self.template.frame_bytes, len(self.templates))

    def payload(self, part: int, layer: int = 0) -> int:
        """Return where the payload of a part begins in a slot, from one of its layers on."""
        return part * self.step + self.template.header_bytes + int(self.template.segments[layer, 0])

    def write(
        self,
        memory: Memory,
        slots: Sequence[int],
        part: int,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        fill: bytes,
        positions: Sequence[int],
        digests: NDArray[np.uint64],
        expires: Sequence[int] | None = None,
    ) -> None:
        """Write one part's headers into slots. digests: uint64[n, segments, 2]."""
        start, end = part * self.step, part * self.step + self.template.frame_bytes
        padding = bytes(0 if part + 1 == len(self.templates) else self.step + start - end)
        headers = self.templates[part].write(keys, parents, fill, positions, digests, expires)
        if not start:
            for slot, header in zip(slots, headers, strict=True):
                memory(slot, len(header))[:] = header
        else:
            for slot, header in zip(slots, headers, strict=True):
                memory(slot, start + len(header))[start:] = header
        if padding:  # what was there before is nobody's to see
            for slot in slots:
                memory(slot, end + len(padding))[end:] = padding

    def read(
        self, memory: Memory, slots: Sequence[int], keys: Sequence[bytes], view: View
    ) -> tuple[NDArray[np.bool_], list[NDArray[np.uint64]]]:
        """Verify the headers of a view's parts in slots.

        Returns which blocks are good, all parts of one fill, and each part's digests.
        """
        good, found, fills = np.ones(len(slots), dtype=np.bool_), [], []
        for place in view.places:
            template, start = self.templates[place.number], place.number * self.step
            end = start + template.header_bytes
            headers = [bytes(memory(slot, end)[start:]) for slot in slots]
            fine, digests = template.read(headers, keys)
            good &= fine
            found.append(digests)
            fills.append([header[FILL] for header in headers])
        if len(fills) > 1:
            one = [len(set(each)) == 1 for each in zip(*fills, strict=True)]
            good &= np.array(one, dtype=np.bool_)
        return good, found


def form_of(layout: Layout, identity: bytes, codec: Codec, number: int) -> Form:
    """Describe blocks of one namespace in one codec."""
    part = layout.part_layout
    templates = (
        Template(part, identity, codec.encoding, codec.segment_bytes, each) for each in layout.parts
    )
    return Form(number, codec, tuple(templates))
