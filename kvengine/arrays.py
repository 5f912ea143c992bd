"""Arrays as entries of the store: what stands for one, and how its bytes are cut.

An array has a head, one small block of a fixed size, which says its dtype and shape and holds its
bytes where they are few; and a body for the others, one block of a size class. There are eight
classes between one power of two and the next, so that few namespaces serve arrays of any size, and
at most an eighth is padding. Both are saved and loaded by the engine's own verbs, as all blocks
are. A body is one writer's, and a head that names another kind of array does not find it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from kvengine.adapters.array import DTYPES, Export, View, export, view
from kvengine.errors import LayoutError
from kvengine.keys import BlockKeys, Namespace
from kvengine.layout import PAYLOAD_BYTES_MAX, Layout
from kvengine.lease import Lease
from kvengine.retention import Retention
from kvengine.transfer import Transfer

HEAD_BYTES = 4096
TEXT_BYTES = 1024  # of a head, for the description; the rest is for the array's bytes
INLINE_BYTES = HEAD_BYTES - TEXT_BYTES
CLASSES = 8  # between one power of two and the next
CHUNK_BYTES_MIN = 512
AXES_MAX = 32
ALIGNMENT = 64  # what jax takes without a copy

HEAD = Layout.opaque(layers=1, page_bytes=HEAD_BYTES, block_tokens=1, permutation="array head 0")
_LENGTH = struct.Struct("<H")


class Described(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a head says of an array. `expires`: seconds since 1970, 0 for never."""

    dtype: str
    shape: tuple[int, ...]
    expires: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPES[self.dtype][1] // 8

    def alike(self, other: Described) -> bool:
        """Whether both describe the same kind of array."""
        return (self.dtype, self.shape) == (other.dtype, other.shape)

    def outlives(self, other: Described) -> bool:
        """Whether this one ends no sooner."""
        return (self.expires or math.inf) >= (other.expires or math.inf)

    def over(self, now: float) -> bool:
        """Whether its time is over."""
        return 0 < self.expires <= now


class Blocks(Protocol):
    """The engine's verbs that arrays need; what they do is said there."""

    def namespace(
        self,
        *,
        model: str,
        layout: Layout,
        revision: str,
        adapter: str,
        salt: str,
        positional: str,
        pool: str,
        source: str,
    ) -> Namespace: ...
    def match(self, keys: BlockKeys) -> Lease: ...
    def save(
        self,
        keys: BlockKeys,
        caches: Sequence[object],
        block_table: object,
        *,
        retention: Sequence[Retention],
    ) -> Transfer: ...
    def load(self, lease: Lease, caches: Sequence[object], block_table: object) -> Transfer: ...
    def drop(self, keys: BlockKeys) -> int: ...


@dataclass(frozen=True, slots=True)
class Source:
    """What has computed an array, as an identity has it."""

    model: str
    revision: str
    adapter: str
    salt: str


class Named:
    """The array of one name. Raises LayoutError for a name that is none."""

    def __init__(self, blocks: Blocks, source: Source, name: str | bytes) -> None:
        self._blocks = blocks
        self._source = source
        self._name = name
        self._hash = name_hash(name)

    def save(self, found: View, ttl_s: float | None, now: float) -> bool:
        """Store an array; whether it is held now. The body first: a head without one is nothing."""
        expires = 0.0 if ttl_s is None else now + ttl_s
        described = Described(found.dtype, found.shape, expires)
        keep = () if ttl_s is None else (Retention(ttl_s=ttl_s),)
        head, body = self._keys(HEAD, self._hash), self._body(described)
        held, _ = self._read(head)
        stays = held is not None and held.alike(described) and held.outlives(described)
        if held is not None and not stays:
            self._drop(head, self._body(held))  # frames say for themselves when their time is over
        if body is not None and not self._put(body, chunks(found, body.namespace.layout), keep):
            return False
        return stays or self._put(head, [head_bytes(described, found)], keep)

    def load(self, now: float) -> View | None:
        """Return the array in new memory; None for a miss."""
        head = self._keys(HEAD, self._hash)
        described, inline = self._read(head)
        if described is None:
            return None
        body = self._body(described)
        if described.over(now):
            self._drop(head, body)
            return None
        if body is None:
            data = memory(described.nbytes)
            data[:] = inline[: described.nbytes]
            return shown(described, data)
        layout = body.namespace.layout
        data = memory(layout.payload_bytes)
        whole = self._get(body, list(data.reshape(layout.layers, 1, layout.head_dim)))
        return shown(described, data) if whole else None

    def _drop(self, head: BlockKeys, body: BlockKeys | None) -> None:
        self._blocks.drop(head)
        if body is not None:
            self._blocks.drop(body)

    def _body(self, described: Described) -> BlockKeys | None:
        if described.nbytes <= INLINE_BYTES:
            return None
        return self._keys(body_layout(described.nbytes), name_hash(self._name, described))

    def _keys(self, layout: Layout, name: bytes) -> BlockKeys:
        source = self._source
        names = self._blocks.namespace(
            model=source.model,
            revision=source.revision,
            adapter=source.adapter,
            salt=source.salt,
            layout=layout,
            positional="",
            pool="embeddings",
            source="name",
        )
        return names.keys_of_hashes([name])

    def _read(self, head: BlockKeys) -> tuple[Described | None, NDArray[np.uint8]]:
        read = np.empty((1, HEAD_BYTES), dtype=np.uint8)
        found = read_head(read[0]) if self._get(head, [read]) else None
        return found, read[0, TEXT_BYTES:]

    def _get(self, keys: BlockKeys, parts: Sequence[object]) -> bool:
        with self._blocks.match(keys) as lease:
            if not lease.blocks:
                return False
            transfer = self._blocks.load(lease, parts, np.zeros(1, dtype=np.int64))
        transfer.wait()  # the engine ends what a tier does not give in time
        return bool(transfer.good.all())

    def _put(
        self, keys: BlockKeys, parts: Sequence[object], retention: Sequence[Retention]
    ) -> bool:
        table = np.zeros(1, dtype=np.int64)
        transfer = self._blocks.save(keys, parts, table, retention=retention)
        transfer.wait()
        return bool(transfer.good.all())


def looked_at(array: object) -> View:
    """Look at an array that is to be saved.

    Raises LayoutError for what is none, too large, not in host memory, or not in one run of bytes.
    """
    found = view(array)
    if found.device[0] not in ("cpu", "cuda_host"):
        raise LayoutError(
            f"the array lies on {found.device[0]}:{found.device[1]}, this engine copies host "
            "memory: move it to the CPU"
        )
    if len(found.shape) > AXES_MAX or found.nbytes > PAYLOAD_BYTES_MAX // 2:
        raise LayoutError(
            f"an array of {len(found.shape)} axes and {found.nbytes} bytes, at most {AXES_MAX} and "
            f"{PAYLOAD_BYTES_MAX // 2} are kept: save it in pieces"
        )
    if not found.compact(len(found.shape)) and found.nbytes:
        raise LayoutError(
            f"the array of shape {list(found.shape)} has strides of {list(found.strides)} bytes, "
            "expected one run of bytes, in order and without gaps: make it contiguous first"
        )
    return found


def name_hash(name: str | bytes, described: Described | None = None) -> bytes:
    """Return 32 bytes for a name; with `described`, for the body of such an array.

    Raises LayoutError for a name that is empty, or neither text nor bytes.
    """
    if not isinstance(name, str | bytes) or not name:
        raise LayoutError(
            f"the name {name!r} of an array, expected text or bytes that change with its content, "
            "such as a digest of what it was computed from"
        )
    data = name.encode() if isinstance(name, str) else name
    kind = b"text " if isinstance(name, str) else b"bytes "
    about = b"head" if described is None else f"{described.dtype}{described.shape}".encode()
    context = "kvengine 2026-11 array name v0"
    return blake3(
        kind + _LENGTH.pack(len(about)) + about + data, derive_key_context=context
    ).digest()


def body_layout(nbytes: int) -> Layout:
    """Return the layout of a body of at least so many bytes: a class, in chunks of equal size."""
    chunk = CHUNK_BYTES_MIN
    while nbytes > 2 * CLASSES * chunk:
        chunk *= 2
    count = -(-nbytes // chunk)
    return Layout.opaque(layers=count, page_bytes=chunk, block_tokens=1, permutation="array body 0")


def chunks(found: View, layout: Layout) -> list[object]:
    """Show an array's bytes as a body's chunks, without a copy but of the last one."""
    size, whole = layout.head_dim, found.nbytes // layout.head_dim
    shown: list[object] = [_bytes(found, at * size, size) for at in range(whole)]
    if rest := found.nbytes - whole * size:
        last = np.zeros((1, size), dtype=np.uint8)
        last[0, :rest] = _numpy(found, whole * size, rest)
        shown.append(last)
    return shown


def head_bytes(described: Described, found: View) -> NDArray[np.uint8]:
    """Write a head, uint8[1, HEAD_BYTES]; with the array's bytes where they have room."""
    head = np.zeros((1, HEAD_BYTES), dtype=np.uint8)
    text = msgspec.msgpack.encode(described)
    assert _LENGTH.size + len(text) <= TEXT_BYTES
    data = _LENGTH.pack(len(text)) + text
    head[0, : len(data)] = np.frombuffer(data, dtype=np.uint8)
    if 0 < found.nbytes <= INLINE_BYTES:
        head[0, TEXT_BYTES : TEXT_BYTES + found.nbytes] = _numpy(found, 0, found.nbytes)
    return head


def read_head(head: NDArray[np.uint8]) -> Described | None:
    """Read a verified head. None: another version has written it."""
    data = head.tobytes()
    (length,) = _LENGTH.unpack_from(data)
    try:
        read = msgspec.msgpack.decode(data[_LENGTH.size : _LENGTH.size + length], type=Described)
    except msgspec.DecodeError:
        return None
    return read if read.dtype in DTYPES else None


def memory(nbytes: int) -> NDArray[np.uint8]:
    """Return new memory, uint8[nbytes], that begins at a multiple of ALIGNMENT."""
    room = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes]


def shown(described: Described, data: NDArray[np.uint8]) -> View:
    """Show the first bytes of `data`, uint8[n], as the array that was described."""
    itemsize = DTYPES[described.dtype][1] // 8
    steps, strides = itemsize, []
    for size in reversed(described.shape):
        strides.append(steps)
        steps *= size
    return View(
        data.ctypes.data,
        described.shape,
        tuple(reversed(strides)),
        described.dtype,
        itemsize,
        ("cpu", 0),
        False,
        data,
    )


def _bytes(found: View, start: int, nbytes: int) -> Export:
    part = replace(
        found,
        address=found.address + start,
        shape=(1, nbytes),
        strides=(nbytes, 1),
        dtype="uint8",
        itemsize=1,
    )
    return export(part)


def _numpy(found: View, start: int, nbytes: int) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = np.asarray(np.from_dlpack(_bytes(found, start, nbytes)), np.uint8)
    row: NDArray[np.uint8] = array[0]
    return row
