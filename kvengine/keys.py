"""Names of blocks: a keyed, chained BLAKE3-256 over everything that determines their content.

    root  = derive_key("… root secret", tenant secret ‖ identity record)
    leaf  = BLAKE3(tokens as u32 little-endian)
    key_i = BLAKE3_keyed(root, key_{i-1} ‖ leaf_i),  key_{-1} = 32 zero bytes

Source: the BLAKE3 specification (keyed_hash and derive_key modes). No key can be formed without the
tenant's secret, and none is ever shortened.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kvengine.errors import BadKey
from kvengine.layout import Layout, Range, View

KEY_BYTES = 32
ROOT_KEY = bytes(KEY_BYTES)
FORMAT_VERSION = 0
FIELD_BYTES_MAX = 1 << 20

Tokens = Sequence[int] | NDArray[np.integer]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the tokens that determines a block's content. Every field is required.

    `adapter`, `media`: content digests (LoRA, images), "" where there is none. `fidelity`: "exact",
    or the lossy codec with its parameters. `pool`: "target", "draft", "embeddings" … `source`: how
    the chain is formed: "tokens", or the serving engine's own hash by name.
    """

    format_version: int
    tenant: str
    model: str
    revision: str
    adapter: str
    media: str
    salt: str
    kv_dtype: str
    fidelity: str
    layout: bytes
    positional: str
    pool: str
    source: str
    epoch: int

    def record(self) -> bytes:
        """Encode as (tag u8, length u32, bytes) for each field, in the order of declaration."""
        parts = []
        for tag, name in enumerate(self.__struct_fields__):
            value = getattr(self, name)
            data = value if isinstance(value, bytes) else str(value).encode()
            if len(data) > FIELD_BYTES_MAX:
                raise BadKey(f"identity field {name!r} has {len(data)} bytes, at most 1 MiB fits")
            parts.append(struct.pack("<BI", tag, len(data)) + data)
        return b"".join(parts)

    def digest(self) -> bytes:
        """Return the 32 public bytes that stand in frame headers. Not enough to form a key."""
        return blake3(self.record(), derive_key_context="kvengine 2026-11 identity v0").digest()

    def root(self, secret: bytes) -> bytes:
        """Return the 32 secret bytes that key this identity's chain."""
        if len(secret) != KEY_BYTES:
            raise BadKey(f"a tenant's secret has {KEY_BYTES} bytes, got {len(secret)}")
        context = "kvengine 2026-11 root secret v0"
        return blake3(secret + self.record(), derive_key_context=context).digest()


def chain(root: bytes, messages: Sequence[bytes | memoryview], parent: bytes = ROOT_KEY) -> bytes:
    """Return the keys of consecutive blocks, 32 bytes each, whose leaves hash `messages`."""
    keys = []
    for message in messages:
        parent = blake3(parent + blake3(message).digest(), key=root).digest()
        keys.append(parent)
    return b"".join(keys)


def token_bytes(tokens: Tokens) -> memoryview:
    """Return tokens as u32 little-endian bytes. Raises BadKey for what is no list of token ids."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise BadKey(f"tokens are a one-dimensional sequence of integers: {error}") from error
    if array.size == 0:
        return memoryview(b"")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadKey(
            f"tokens are a one-dimensional sequence of integers, got shape {array.shape} of "
            f"{array.dtype}: flatten it, one request at a time"
        )
    if array.dtype != np.uint32:
        if int(array.min()) < 0 or int(array.max()) >= 1 << 32:
            raise BadKey(f"token ids lie in 0..2**32-1, got {int(array.min())}..{int(array.max())}")
    return np.ascontiguousarray(array, dtype="<u4").data.cast("B")


@dataclass(frozen=True, slots=True)
class Namespace:
    """One identity under one tenant: where keys come from. Made by `Engine.namespace`.

    `chosen` is what a rank has of each block; None: all of it.
    """

    identity: Identity
    layout: Layout
    number: int
    digest: bytes
    root: bytes
    chosen: View | None = None

    def __repr__(self) -> str:
        return f"Namespace({self.identity.model!r}, pool={self.identity.pool!r})"

    @property
    def view(self) -> View:
        """What `save` takes and `load` gives of each block."""
        return self.chosen or self.layout.view()

    def part(self, *, layers: Range | None = None, heads: Range | None = None) -> Namespace:
        """Return the same namespace for a rank that has these layers and heads: first, and end.

        Its keys are the same; caches for them have its layers and heads only. None: all of them.
        Any range can be loaded, whole parts saved. Raises LayoutError for a range that is none.
        """
        return replace(self, chosen=self.layout.view(layers, heads))

    def keys(self, tokens: Tokens) -> BlockKeys:
        """Name the full blocks of a prompt. A last, partial block has no key.

        tokens: 1-D integers below 2**32. Raises BadKey otherwise.
        """
        return BlockKeys(self, chain(self.root, self.leaves(tokens)))

    def leaves(self, tokens: Tokens) -> list[memoryview]:
        """Cut tokens into full blocks, as the chain hashes them."""
        data = token_bytes(tokens)
        step = 4 * self.layout.block_tokens
        return [data[at : at + step] for at in range(0, len(data) - step + 1, step)]

    def keys_of_hashes(
        self, hashes: Sequence[bytes], position: int = 0, parent: bytes | None = None
    ) -> BlockKeys:
        """Name blocks by a serving engine's own chained hashes, in their order.

        Each is at least 32 bytes of a cryptographic hash that covers all tokens before it; it is
        keyed by the root, so tenants and models stay apart. `position` is the index of the first
        in its prompt, `parent` the hash before it, where known. Raises BadKey for shorter ones.
        """
        last = position + max(0, len(hashes) - 1)
        if not 0 <= position <= last < 1 << 32:
            raise BadKey(f"a block's position lies in 0..2**32-1, got {position}..{last}")
        for index, value in enumerate(hashes if parent is None else [*hashes, parent]):
            if len(value) < KEY_BYTES:
                name = f"hash {index}" if index < len(hashes) else "the parent's hash"
                raise BadKey(
                    f"{name} has {len(value)} bytes, expected at least {KEY_BYTES}: "
                    "configure the serving engine to hash blocks with sha256"
                )
        root = self.root
        data = b"".join(blake3(value, key=root).digest() for value in hashes)
        before = ROOT_KEY if parent is None else blake3(parent, key=root).digest()
        return BlockKeys(self, data, position, before)

    def keys_of(self, table: bytes, parent: bytes = ROOT_KEY) -> BlockKeys:
        """Wrap keys that were formed before. Raises BadKey if a key has not 32 bytes."""
        if len(table) % KEY_BYTES or len(parent) != KEY_BYTES:
            raise BadKey(
                f"keys have {KEY_BYTES} bytes each, got {len(table)} bytes of keys and a parent "
                f"of {len(parent)}"
            )
        return BlockKeys(self, table, 0, parent)


@dataclass(frozen=True, slots=True)
class BlockKeys:
    """Keys of consecutive blocks of one prompt.

    `position` is the index of the first block in the prompt, `parent` the key before it.
    """

    namespace: Namespace
    data: bytes
    position: int = 0
    parent: bytes = ROOT_KEY

    def __len__(self) -> int:
        return len(self.data) // KEY_BYTES

    def __getitem__(self, part: slice) -> BlockKeys:
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise BadKey(f"a run of keys is sliced with step 1, got {step}")
        stop = max(start, stop)
        parent = self.parent if start == 0 else self.key(start - 1)
        data = self.data[start * KEY_BYTES : stop * KEY_BYTES]
        return BlockKeys(self.namespace, data, self.position + start, parent)

    def following(self, tokens: Tokens) -> BlockKeys:
        """Name the full blocks of the tokens that come after these blocks, without their keys.

        For a stream that grows: nothing before is hashed again. Only for keys of tokens, not of a
        serving engine's hashes. Raises BadKey as `Namespace.keys` does.
        """
        names = self.namespace
        position = self.position + len(self)
        parent = self.key(len(self) - 1) if len(self) else self.parent
        return BlockKeys(names, chain(names.root, names.leaves(tokens), parent), position, parent)

    def key(self, index: int) -> bytes:
        """Return one key, 32 bytes."""
        return self.data[index * KEY_BYTES : (index + 1) * KEY_BYTES]

    @property
    def table(self) -> NDArray[np.uint8]:
        """The keys as uint8[n, 32], read-only."""
        return np.frombuffer(self.data, dtype=np.uint8).reshape(-1, KEY_BYTES)

    @property
    def words(self) -> NDArray[np.uint64]:
        """The keys as uint64[n, 4], read-only: what the index probes."""
        return np.frombuffer(self.data, dtype="<u8").reshape(-1, 4)

    @property
    def prints(self) -> NDArray[np.int64]:
        """The first 8 bytes of each key, int64[n]: by these a policy knows what has left."""
        return self.words[:, 0].copy().view(np.int64)
