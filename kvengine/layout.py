"""How the bytes of one block are arranged: said once, hashed into every key.

A block holds `block_tokens` consecutive tokens of every layer. A frame's payload is one segment a
layer, K then V, each in the axis order of the caller's cache (`order`), so that nothing is permuted
on the way. Arrays of a paged cache and of a contiguous sequence with the same `order` make the same
frames. A block of a model that runs on several ranks is cut into parts, each a frame of its own: so
many ranges of layers times so many ranges of heads, all of one size. A rank has a `View`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from blake3 import blake3

from kvengine.errors import LayoutError

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "int8": 1,
    "uint8": 1,
}
LAYERS_MAX = 4096
# What the fields of a frame's header hold.
FIELDS_MAX = {"layers": LAYERS_MAX, "kv_heads": 0xFFFF, "block_tokens": 0xFFFF_FFFF}
PAYLOAD_BYTES_MAX = 1 << 40
PARTS_MAX = 64

Range = tuple[int, int]


class Part(NamedTuple):
    """A range of layers and a range of heads, as a frame's header has them."""

    layer: int
    layer_end: int
    head: int
    head_end: int


class Place(NamedTuple):
    """A part of a block as one rank has it: its number, where it lies in the rank's arrays, and
    which of its layers and heads those are."""

    number: int
    part: Part
    layers: Range
    heads: Range


@dataclass(frozen=True, slots=True)
class View:
    """What one rank has of each block. Made by `Layout.view`.

    `layout` describes the rank's own arrays. Ranks save whole parts only: then `mask` has one bit
    for each of them, else 0.
    """

    part: Part
    layout: Layout
    places: tuple[Place, ...]
    mask: int

    @property
    def lanes(self) -> int:
        """How many of its parts each layer has."""
        return sum(place.part.layer == 0 for place in self.places)


@dataclass(frozen=True, slots=True)
class Layout:
    """Describe one model's K/V blocks.

    `head_dim_v` is 0 where a layer has a single component (an MLA latent, an opaque page).
    `order` names the axes of a block in the caller's cache and in the frame: NHD is
    [tokens, heads, dim], HND [heads, tokens, dim]. `paged` says whether the caller's arrays carry a
    leading block axis; it does not change a frame, so it is not part of the digest.
    `permutation` names a byte order of the engine's own that the axes do not show (CPU attention
    kernels have one): equal bytes are promised only between equal names.
    `attention` says what the pool needs to go on after n tokens: all before ("full"), the first
    `sink_tokens` and the last `window_tokens` - 1 ("sliding": a token sees so many, itself
    included), or the block that ends there ("state": a snapshot, opaque).
    `layer_parts` and `head_parts` cut a block: as many as the most ranks that pipeline and tensor
    parallelism will ever have; readers of fewer ranks load several parts. Replicated heads and MLA
    are not cut by heads: one of the ranks writes.
    Raises LayoutError for what does not fit, naming the field.
    """

    layers: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: str
    block_tokens: int = 16
    order: Literal["NHD", "HND"] = "NHD"
    paged: bool = True
    attention: Literal["full", "sliding", "state"] = "full"
    permutation: str = ""
    layer_parts: int = 1
    head_parts: int = 1
    window_tokens: int = 0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LayoutError(
                    f"Layout.{name} must be a whole number of at least 1, got {value!r}"
                )
        if not isinstance(self.head_dim_v, int) or self.head_dim_v < 0:
            raise LayoutError(f"Layout.head_dim_v must be 0 or more, got {self.head_dim_v!r}")
        for name, most in FIELDS_MAX.items():
            if getattr(self, name) > most:
                raise LayoutError(f"Layout.{name} is at most {most}, got {getattr(self, name)}")
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise LayoutError(f"Layout.dtype {self.dtype!r} is not one of {known}")
        if not isinstance(self.permutation, str):
            raise LayoutError(f"Layout.permutation must be text, got {self.permutation!r}")
        if self.order not in ("NHD", "HND"):
            raise LayoutError(f"Layout.order must be 'NHD' or 'HND', got {self.order!r}")
        self._check_attention()
        self._check_parts()
        if self.payload_bytes > PAYLOAD_BYTES_MAX:
            raise LayoutError(
                f"a block of {self.payload_bytes} bytes, at most {PAYLOAD_BYTES_MAX} fit in a "
                "frame: use a smaller Layout.block_tokens, head_dim or head_dim_v"
            )

    def _check_attention(self) -> None:
        if self.attention not in ("full", "sliding", "state"):
            raise LayoutError(
                f"Layout.attention must be 'full', 'sliding' or 'state', got {self.attention!r}"
            )
        window, sinks = self.window_tokens, self.sink_tokens
        if self.attention == "sliding":
            if not (
                isinstance(window, int) and window >= 1 and isinstance(sinks, int) and sinks >= 0
            ):
                raise LayoutError(
                    f"Layout.window_tokens is {window!r} and sink_tokens {sinks!r}: with attention "
                    "'sliding' a window has at least 1 token, and 0 or more sinks"
                )
        elif (window, sinks) != (0, 0):
            raise LayoutError(
                f"Layout.window_tokens is {window!r} and sink_tokens {sinks!r}, expected 0 with "
                f"attention {self.attention!r}"
            )

    def _check_parts(self) -> None:
        for name, whole in (("layer_parts", "layers"), ("head_parts", "kv_heads")):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or getattr(self, whole) % value:
                raise LayoutError(
                    f"Layout.{name} must divide Layout.{whole} ({getattr(self, whole)}), got "
                    f"{value!r}: parts are all of one size"
                )
        if self.part_count > PARTS_MAX:
            raise LayoutError(
                f"a block of {self.layer_parts} x {self.head_parts} parts, at most {PARTS_MAX} in "
                "all: give as many layer_parts and head_parts as there are ranks"
            )

    @classmethod
    def opaque(
        cls,
        *,
        layers: int,
        page_bytes: int,
        block_tokens: int,
        permutation: str,
        attention: Literal["full", "state"] = "full",
    ) -> Layout:
        """Describe pages whose inside only the serving engine knows: `page_bytes` a layer."""
        if not permutation:
            raise LayoutError(
                "Layout.permutation is empty, expected a name of the pages' byte order: pages of "
                "another order would be taken for the same"
            )
        return cls(
            layers, 1, page_bytes, 0, "uint8", block_tokens, "HND", True, attention, permutation
        )

    @property
    def is_opaque(self) -> bool:
        """Whether a page is bytes of an order that only `permutation` names."""
        return self.permutation != "" and self.head_dim_v == 0 and self.dtype == "uint8"

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Width of a head in each component of a layer: (K, V), or (latent,)."""
        return (self.head_dim, self.head_dim_v) if self.head_dim_v else (self.head_dim,)

    @property
    def component_bytes(self) -> tuple[int, ...]:
        """Bytes of each component of one layer of one block."""
        if self.is_opaque:
            return (self.head_dim,)
        tokens = self.block_tokens * self.kv_heads * self.item_bytes
        return tuple(tokens * dim for dim in self.head_dims)

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment: one layer of one block, K and V."""
        return sum(self.component_bytes)

    @property
    def payload_bytes(self) -> int:
        """Bytes of K/V in one block, as the `raw` codec stores them."""
        return self.layers * self.segment_bytes

    @property
    def window_blocks(self) -> int:
        """How many blocks before a token a pool needs that is not of full attention."""
        if self.attention == "state":
            return 1
        return -(-max(0, self.window_tokens - 1) // self.block_tokens)

    @property
    def sink_blocks(self) -> int:
        """How many blocks hold the sinks."""
        return -(-self.sink_tokens // self.block_tokens)

    @property
    def part_count(self) -> int:
        """How many parts a block has."""
        return self.layer_parts * self.head_parts

    @property
    def part_layout(self) -> Layout:
        """Describe one part, as if it were a block."""
        if self.part_count == 1:
            return self
        return self._cut(self.layers // self.layer_parts, self.kv_heads // self.head_parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a block in the order of their frames: by layers, then by heads."""
        layers, heads = self.layers // self.layer_parts, self.kv_heads // self.head_parts
        return tuple(
            Part(layer, layer + layers, head, head + heads)
            for layer in range(0, self.layers, layers)
            for head in range(0, self.kv_heads, heads)
        )

    def view(self, layers: Range | None = None, heads: Range | None = None) -> View:
        """Name some layers and heads of every block, from first to last, the last excluded.

        None: all of them. Raises LayoutError for a range that is none.
        """
        if self.part_count == 1 and layers is None and heads is None:
            part = Part(0, self.layers, 0, self.kv_heads)
            place = Place(0, part, (0, self.layers), (0, self.kv_heads))
            return View(part, self, (place,), 1)
        here = Part(
            *self._range("layers", layers, self.layers), *self._range("heads", heads, self.kv_heads)
        )
        places, mask, whole = [], 0, True
        for number, part in enumerate(self.parts):
            layer, layer_end = max(part.layer, here.layer), min(part.layer_end, here.layer_end)
            head, head_end = max(part.head, here.head), min(part.head_end, here.head_end)
            if layer < layer_end and head < head_end:
                found = Part(layer, layer_end, head, head_end)
                whole &= found == part
                mask |= 1 << number
                mine = Part(
                    layer - here.layer,
                    layer_end - here.layer,
                    head - here.head,
                    head_end - here.head,
                )
                inside = (layer - part.layer, layer_end - part.layer)
                heads_inside = (head - part.head, head_end - part.head)
                places.append(Place(number, mine, inside, heads_inside))
        layout = self._cut(here.layer_end - here.layer, here.head_end - here.head)
        return View(here, layout, tuple(places), mask if whole else 0)

    def _cut(self, layers: int, heads: int) -> Layout:
        return replace(self, layers=layers, kv_heads=heads, layer_parts=1, head_parts=1)

    def _range(self, name: str, given: Range | None, count: int) -> Range:
        first, last = (0, count) if given is None else given
        if not 0 <= first < last <= count:
            raise LayoutError(
                f"{name} {first}..{last}, expected a range within 0..{count}, the last excluded"
            )
        return first, last

    def digest(self) -> bytes:
        """Return 32 bytes that differ between any two layouts whose frames differ."""
        fields = [
            "layers",
            "kv_heads",
            "head_dim",
            "head_dim_v",
            "dtype",
            "block_tokens",
            "order",
            "attention",
            "permutation",
            "layer_parts",
            "head_parts",
        ]
        if self.attention == "sliding":  # deeper layers are made of what a window has let through
            fields += ["window_tokens", "sink_tokens"]
        text = "\n".join(f"{name}={getattr(self, name)!r}" for name in fields)
        return blake3(text.encode(), derive_key_context="kvengine 2026-11 layout v0").digest()
