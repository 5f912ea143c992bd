"""How the bytes of one block are arranged: said once, hashed into every key.

A block holds `block_tokens` consecutive tokens of every layer. A frame's payload is one segment a
layer, K then V, each in the axis order of the caller's cache (`order`), so that nothing is permuted
on the way. Arrays of a paged cache and of a contiguous sequence with the same `order` make the same
frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class Layout:
    """Describe one model's K/V blocks.

    `head_dim_v` is 0 where a layer has a single component (an MLA latent, an opaque page).
    `order` names the axes of a block in the caller's cache and in the frame: NHD is
    [tokens, heads, dim], HND [heads, tokens, dim]. `paged` says whether the caller's arrays carry a
    leading block axis; it does not change a frame, so it is not part of the digest.
    `permutation` names a byte order of the engine's own that the axes do not show (CPU attention
    kernels have one): equal bytes are promised only between equal names.
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
        if self.attention != "full":
            raise LayoutError(
                f"Layout.attention {self.attention!r} is not supported yet, expected 'full': "
                "do not attach the engine to sliding-window or recurrent layers"
            )
        if (self.layer_parts, self.head_parts) != (1, 1):
            raise LayoutError(
                f"blocks of {self.layer_parts} x {self.head_parts} parts are not supported yet, "
                "expected 1 x 1: open the engine in one process that sees all heads and layers"
            )
        if self.payload_bytes > PAYLOAD_BYTES_MAX:
            raise LayoutError(
                f"a block of {self.payload_bytes} bytes, at most {PAYLOAD_BYTES_MAX} fit in a "
                "frame: use a smaller Layout.block_tokens, head_dim or head_dim_v"
            )

    @classmethod
    def opaque(cls, *, layers: int, page_bytes: int, block_tokens: int, permutation: str) -> Layout:
        """Describe pages whose inside only the serving engine knows: `page_bytes` a layer."""
        if not permutation:
            raise LayoutError(
                "Layout.permutation is empty, expected a name of the pages' byte order: pages of "
                "another order would be taken for the same"
            )
        return cls(
            layers, 1, page_bytes, 0, "uint8", block_tokens, "HND", True, "full", permutation
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

    def digest(self) -> bytes:
        """Return 32 bytes that differ between any two layouts whose frames differ."""
        fields = (
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
        )
        text = "\n".join(f"{name}={getattr(self, name)!r}" for name in fields)
        return blake3(text.encode(), derive_key_context="kvengine 2026-11 layout v0").digest()
