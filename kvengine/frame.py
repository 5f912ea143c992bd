"""One frame, free of location: the same bytes in the arena, on disk and on the wire.

    offset  bytes  field
    0       4      magic "KVEF"
    4       2      format version (0)
    6       2      encoding (0 raw)
    8       4      header bytes: fixed part + segment table, padded to 4 KiB
    12      4      segments
    16      8      payload bytes
    24      32     key
    56      32     parent key (zeros: first block of a prompt)
    88      32     identity digest
    120     16     fill id: parts of one block combine only if they carry the same
    136     8      part: first layer, end layer, first head, end head (u16 each)
    144     4      position of the block in its prompt
    148     4      tokens in the block
    152     2      digest kind (1 xxh3-128)
    154     2      flags (0)
    156     4      key id for sealing (0: plain)
    160     80     reserved, zero
    240     16     header digest: xxh3-128 of the header with this field zero
    256     32 each   segment table: offset u64, bytes u64, digest u64 low, u64 high

All little-endian; segment offsets count from the start of the payload, which follows the header.
A header verifies by its own digest; each segment of the payload by the one in the table.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvengine.errors import FrameError
from kvengine.keys import KEY_BYTES
from kvengine.layout import LAYERS_MAX, Layout

MAGIC = b"KVEF"
VERSION = 0
ENCODING_RAW = 0
DIGEST_XXH3_128 = 1
PAGE_BYTES = 4096
FIXED_BYTES = 256
SEGMENT_BYTES = 32
PAYLOAD_BYTES_MAX = 1 << 40
DIGEST_AT = FIXED_BYTES - 16

_FIXED = struct.Struct("<4sHHIIQ32s32s32s16s4HIIHHI80s16s")
assert _FIXED.size == FIXED_BYTES


def header_bytes(segments: int) -> int:
    """Return the size of a header with so many segments: a multiple of 4 KiB."""
    return -(-(FIXED_BYTES + SEGMENT_BYTES * segments) // PAGE_BYTES) * PAGE_BYTES


def frame_bytes(layout: Layout) -> int:
    """Return the size of a `raw` frame of this layout."""
    return header_bytes(layout.layers) + layout.payload_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself. `digests` is uint64[segments, 2], (low, high)."""

    key: bytes
    parent: bytes
    identity: bytes
    fill: bytes
    part: tuple[int, int, int, int]
    position: int
    tokens: int
    segments: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    encoding: int = ENCODING_RAW
    digest_kind: int = DIGEST_XXH3_128
    key_id: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return int(self.segments[:, 1].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole frame."""
        return header_bytes(len(self.segments)) + self.payload_bytes

    def encode(self) -> bytes:
        """Return the header's bytes, its own digest included."""
        count = len(self.segments)
        size = header_bytes(count)
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.encoding,
            size,
            count,
            self.payload_bytes,
            self.key,
            self.parent,
            self.identity,
            self.fill,
            *self.part,
            self.position,
            self.tokens,
            self.digest_kind,
            0,
            self.key_id,
            bytes(80),
            bytes(16),
        )
        table = np.concatenate([self.segments, self.digests], axis=1).astype("<u8").tobytes()
        data = bytearray(size)
        data[:FIXED_BYTES] = fixed
        data[FIXED_BYTES : FIXED_BYTES + len(table)] = table
        data[DIGEST_AT:FIXED_BYTES] = xxhash.xxh3_128_digest(bytes(data))
        return bytes(data)


def decode(data: bytes | memoryview) -> Header:
    """Read and verify a header. Raises FrameError naming what does not hold.

    data: at least the header; the payload may follow. The payload is not looked at.
    """
    if len(data) < FIXED_BYTES:
        raise FrameError(f"a frame has at least {FIXED_BYTES} bytes, got {len(data)}")
    (magic, version, encoding, size, count, payload, key, parent, identity, fill, *rest) = (
        _FIXED.unpack_from(data)
    )
    (layer, layer_end, head, head_end, position, tokens, kind, flags, key_id, blank, digest) = rest
    if magic != MAGIC:
        raise FrameError(f"no frame: it begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version {version}, this reader knows {VERSION}")
    if not 1 <= count <= LAYERS_MAX or size != header_bytes(count):
        raise FrameError(f"a header of {size} bytes does not hold {count} segments")
    if len(data) < size:
        raise FrameError(f"a truncated header: {len(data)} of {size} bytes")
    whole = bytearray(data[:size])
    whole[DIGEST_AT:FIXED_BYTES] = bytes(16)
    if xxhash.xxh3_128_digest(bytes(whole)) != digest:
        raise FrameError("the header's digest does not match: its bytes have changed")
    if encoding != ENCODING_RAW or kind != DIGEST_XXH3_128 or flags or any(blank):
        raise FrameError(f"encoding {encoding}, digest kind {kind}, flags {flags}: not known here")
    table = np.frombuffer(whole, "<u8", count * 4, FIXED_BYTES).reshape(count, 4)
    segments, digests = table[:, :2].copy(), table[:, 2:].copy()
    offsets = np.concatenate([[0], np.cumsum(segments[:, 1])])
    if payload > PAYLOAD_BYTES_MAX or int(offsets[-1]) != payload:
        raise FrameError(f"segments of {int(offsets[-1])} bytes in a payload of {payload}")
    if not np.array_equal(offsets[:-1], segments[:, 0]):
        raise FrameError("segments do not tile the payload in order")
    part = (layer, layer_end, head, head_end)
    return Header(
        key,
        parent,
        identity,
        fill,
        part,
        position,
        tokens,
        segments,
        digests,
        encoding,
        kind,
        key_id,
    )


class Template:
    """Headers of one namespace's frames, written and read a table at a time.

    Only key, parent, fill, position and digests differ between frames of a namespace; the rest is
    laid down once here, and compared byte for byte on reading.
    """

    def __init__(self, layout: Layout, identity: bytes) -> None:
        sizes = np.full(layout.layers, layout.segment_bytes, dtype=np.uint64)
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
        self.segments = np.stack([offsets, sizes], axis=1)
        self.header_bytes = header_bytes(layout.layers)
        blank = Header(
            key=bytes(KEY_BYTES),
            parent=bytes(KEY_BYTES),
            identity=identity,
            fill=bytes(16),
            part=(0, layout.layers, 0, layout.kv_heads),
            position=0,
            tokens=layout.block_tokens,
            segments=self.segments,
            digests=np.zeros((layout.layers, 2), dtype=np.uint64),
        ).encode()
        self._blank = np.frombuffer(blank, dtype=np.uint8).copy()
        self._blank[DIGEST_AT:FIXED_BYTES] = 0

    def write(
        self,
        keys: NDArray[np.uint8],
        parents: NDArray[np.uint8],
        fill: bytes,
        positions: NDArray[np.integer],
        digests: NDArray[np.uint64],
    ) -> NDArray[np.uint8]:
        """Return the headers of n frames, uint8[n, header_bytes].

        keys, parents: uint8[n, 32]; positions: [n]; digests: uint64[n, segments, 2].
        """
        data = np.tile(self._blank, (len(keys), 1))
        data[:, 24:56] = keys
        data[:, 56:88] = parents
        data[:, 120:136] = np.frombuffer(fill, dtype=np.uint8)
        data[:, 144:148] = positions.astype("<u4").reshape(-1, 1).view(np.uint8)
        self._table(data)[:, :, 2:] = digests
        data[:, DIGEST_AT:FIXED_BYTES] = self._digests(data)
        return data

    def read(
        self, data: NDArray[np.uint8], keys: NDArray[np.uint8]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """Verify n headers against this namespace and their keys.

        data: uint8[n, header_bytes], overwritten; keys: uint8[n, 32]. Returns which are good, and
        their segments' digests, uint64[n, segments, 2].
        """
        found = data[:, DIGEST_AT:FIXED_BYTES].copy()
        data[:, DIGEST_AT:FIXED_BYTES] = 0
        good = (found == self._digests(data)).all(axis=1)
        good &= (data[:, 24:56] == keys).all(axis=1)
        for start, stop in ((0, 24), (88, 120), (136, 144), (148, DIGEST_AT)):
            good &= (data[:, start:stop] == self._blank[start:stop]).all(axis=1)
        table = self._table(data)
        good &= (table[:, :, :2] == self.segments).all(axis=(1, 2))
        return good, np.ascontiguousarray(table[:, :, 2:])

    def _digests(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = self.header_bytes
        flat = data.data.cast("B") if len(data) else memoryview(b"")
        digests = (xxhash.xxh3_128_digest(flat[at : at + size]) for at in range(0, len(flat), size))
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)

    def _table(self, data: NDArray[np.uint8]) -> NDArray[np.uint64]:
        end = FIXED_BYTES + SEGMENT_BYTES * len(self.segments)
        return data[:, FIXED_BYTES:end].view("<u8").reshape(len(data), len(self.segments), 4)


def verify_payload(header: Header, payload: memoryview) -> list[int]:
    """Return the segments whose bytes do not match their digest, [] where all do."""
    bad = []
    for index, (offset, nbytes) in enumerate(header.segments.tolist()):
        data = payload[offset : offset + nbytes]
        low, high = header.digests[index].tolist()
        if len(data) != nbytes or xxhash.xxh3_128_intdigest(data) != high << 64 | low:
            bad.append(index)
    return bad


def digests_of(payload: memoryview, segments: Sequence[tuple[int, int]]) -> NDArray[np.uint64]:
    """Return uint64[segments, 2] of a payload cut at (offset, nbytes)."""
    mask = (1 << 64) - 1
    values = (xxhash.xxh3_128_intdigest(payload[at : at + size]) for at, size in segments)
    return np.array([(v & mask, v >> 64) for v in values], dtype=np.uint64).reshape(-1, 2)
