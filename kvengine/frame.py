"""One frame, free of location: the same bytes in the arena, on disk and on the wire.

    offset  bytes  field
    0       4      magic "KVEF"
    4       2      format version (0)
    6       2      encoding (0 raw, 1 lossless, 2 int8, 3 fp8, 4 int4, 5 rot4)
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
    152     2      digest kind (1 xxh3-128; 2 AES-256-GCM tags: a sealed frame, kvengine.seal)
    154     2      flags (0)
    156     4      key id for sealing (0: plain)
    160     4      expires: seconds since 1970 after which it is not used (0: never)
    164     32     salt of a sealed frame, else zero
    196     60     reserved, zero
    256     16 S   segments: offset u64, bytes u64 each
    …       16 S   their digests: low u64, high u64 each
    …              zero, up to 16 bytes before the header's end
    end-16  16     header digest: xxh3-128 of all header bytes before it, low half first

All little-endian; segment offsets count from the start of the payload, which follows the header.
A header verifies by its own digest; each segment of the payload by the one in the table. All that
differs between two frames of a namespace stands in few, contiguous places, so that headers are put
together from pieces.

A block is one frame, or one for each of its parts, each at the start of a page, with zeros between
them and nothing after the last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvengine.errors import FrameError
from kvengine.keys import KEY_BYTES
from kvengine.layout import LAYERS_MAX, PAYLOAD_BYTES_MAX, Layout

MAGIC = b"KVEF"
VERSION = 0
ENCODING_RAW = 0
ENCODING_LOSSLESS = 1
ENCODING_INT8 = 2
ENCODING_FP8 = 3
ENCODING_INT4 = 4
ENCODING_ROT4 = 5
ENCODINGS = range(6)
DIGEST_XXH3_128 = 1
TAG_AES_256_GCM = 2
SALT_BYTES = 32
PAGE_BYTES = 4096
FIXED_BYTES = 256
FILL = slice(120, 136)
EXPIRES = slice(160, 164)
NEVER = 0
SEGMENT_BYTES = 32
DIGEST_BYTES = 16

_FIXED = struct.Struct("<4sHHIIQ32s32s32s16s4HIIHHII32s60s")
assert _FIXED.size == FIXED_BYTES


def _digest(header: bytes) -> bytes:
    return xxhash.xxh3_128_intdigest(header).to_bytes(DIGEST_BYTES, "little")


def header_digest(frame: memoryview) -> bytes:
    """Return the digest that a frame's header carries. Raises FrameError where it has no header."""
    size = int.from_bytes(frame[8:12], "little")
    if not FIXED_BYTES <= size <= len(frame):
        raise FrameError(f"a header of {size} bytes in a frame of {len(frame)}")
    return bytes(frame[size - DIGEST_BYTES : size])


def header_bytes(segments: int) -> int:
    """Return the size of a header with so many segments: a multiple of 4 KiB."""
    used = FIXED_BYTES + SEGMENT_BYTES * segments + DIGEST_BYTES
    return -(-used // PAGE_BYTES) * PAGE_BYTES


def frame_bytes(layout: Layout) -> int:
    """Return the size of a block of this layout in `raw` frames."""
    part = layout.part_layout
    return block_bytes(header_bytes(part.layers) + part.payload_bytes, layout.part_count)


def block_bytes(nbytes: int, parts: int) -> int:
    """Return the size of a block whose parts are frames of so many bytes."""
    return (parts - 1) * pages(nbytes) + nbytes


def pages(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


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
    expires: int = NEVER
    salt: bytes = bytes(SALT_BYTES)

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
            self.expires,
            self.salt,
            bytes(60),
        )
        tables = self.segments.astype("<u8").tobytes() + self.digests.astype("<u8").tobytes()
        data = (fixed + tables).ljust(size - DIGEST_BYTES, b"\0")
        return data + _digest(data)


def decode(data: bytes | memoryview, digest_kind: int = DIGEST_XXH3_128) -> Header:
    """Read and verify a header. Raises FrameError naming what does not hold.

    data: at least the header; the payload may follow. The payload is not looked at. A frame of
    another digest kind is refused: who expects a plain one takes no sealed one, and the reverse.
    """
    if len(data) < FIXED_BYTES:
        raise FrameError(f"a frame has at least {FIXED_BYTES} bytes, got {len(data)}")
    (magic, version, encoding, size, count, payload, key, parent, identity, fill, *rest) = (
        _FIXED.unpack_from(data)
    )
    (layer, layer_end, head, head_end, position, tokens, kind, flags, key_id, *rest) = rest
    expires, salt, blank = rest
    if magic != MAGIC:
        raise FrameError(f"no frame: it begins with {bytes(magic)!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise FrameError(f"frame version {version}, this reader knows {VERSION}")
    if not 1 <= count <= LAYERS_MAX or size != header_bytes(count):
        raise FrameError(f"a header of {size} bytes does not hold {count} segments")
    if len(data) < size:
        raise FrameError(f"a truncated header: {len(data)} of {size} bytes")
    whole = bytes(data[:size])
    if _digest(whole[:-DIGEST_BYTES]) != whole[-DIGEST_BYTES:]:
        raise FrameError("the header's digest does not match: its bytes have changed")
    padding = whole[FIXED_BYTES + SEGMENT_BYTES * count : -DIGEST_BYTES]
    zeros = (blank, padding) if kind == TAG_AES_256_GCM else (salt, blank, padding)
    if encoding not in ENCODINGS or kind != digest_kind or flags or any(map(any, zeros)):
        raise FrameError(f"encoding {encoding}, digest kind {kind}, flags {flags}: not known here")
    tables = np.frombuffer(whole, "<u8", count * 4, FIXED_BYTES).reshape(2, count, 2)
    segments, digests = tables[0].copy(), tables[1].copy()
    sizes = segments[:, 1].tolist()  # Python's integers: no sum of them wraps around
    if payload > PAYLOAD_BYTES_MAX or sum(sizes) != payload:
        raise FrameError(f"segments of {sum(sizes)} bytes in a payload of {payload}")
    if list(accumulate(sizes[:-1], initial=0)) != segments[:, 0].tolist():
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
        expires,
        salt,
    )


def frames(block: memoryview) -> Iterator[tuple[memoryview, Header]]:
    """Yield payload and header of each frame of a block, all of one block and one fill.

    Raises FrameError where they are not, or do not fill the block; payloads are not looked at.
    """
    first, at = None, 0
    while True:
        header = decode(block[at:])
        end = at + header.nbytes
        first = first or header
        if (header.key, header.identity, header.fill) != (first.key, first.identity, first.fill):
            raise FrameError("parts of two blocks, or of two fills")
        if end > len(block):
            raise FrameError(f"a frame of {header.nbytes} bytes in {len(block) - at}")
        yield block[end - header.payload_bytes : end], header
        if end == len(block):
            return
        at = pages(end)
        if at >= len(block) or any(block[end:at]):
            raise FrameError(f"{len(block) - end} bytes after a frame that are none")


class Template:
    """Headers of one namespace's frames in one encoding, put together and taken apart again.

    layout: of a block that is one frame, or of one part; segment_bytes: uint64[layers], sizes of
    the encoded segments; those of `raw` if None; part: which one it is of its block.

    Only key, parent, fill, position, digests and when it expires differ between frames of a
    namespace; the rest is laid down once here, and compared byte for byte on reading. Plain bytes,
    not arrays: after a large copy the processor's caches are cold, and an array operation then
    costs ten times more.
    """

    def __init__(
        self,
        layout: Layout,
        identity: bytes,
        encoding: int = ENCODING_RAW,
        segment_bytes: NDArray[np.uint64] | None = None,
        part: tuple[int, int, int, int] | None = None,
    ) -> None:
        sizes = segment_bytes
        if sizes is None:
            sizes = np.full(layout.layers, layout.segment_bytes, dtype=np.uint64)
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
        self.segments = np.stack([offsets, sizes], axis=1)
        self.header_bytes = header_bytes(layout.layers)
        self.frame_bytes = self.header_bytes + int(sizes.sum())
        blank = Header(
            key=bytes(KEY_BYTES),
            parent=bytes(KEY_BYTES),
            identity=identity,
            fill=bytes(16),
            part=part or (0, layout.layers, 0, layout.kv_heads),
            position=0,
            tokens=layout.block_tokens,
            segments=self.segments,
            digests=np.zeros((layout.layers, 2), dtype=np.uint64),
            encoding=encoding,
        ).encode()
        self._step = DIGEST_BYTES * layout.layers
        self._digests_at = FIXED_BYTES + self._step
        digests_end = self._digests_at + self._step
        self._start, self._identity, self._part = blank[:24], blank[88:120], blank[136:144]
        self._middle = blank[148 : EXPIRES.start], blank[EXPIRES.stop : self._digests_at]
        self._padding = blank[digests_end:-DIGEST_BYTES]

    def write(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes],
        fill: bytes,
        positions: Sequence[int],
        digests: NDArray[np.uint64],
        expires: Sequence[int] | None = None,
    ) -> Iterator[bytes]:
        """Yield n headers. digests: uint64[n, segments, 2]; expires: never, if None."""
        expires = [NEVER] * len(keys) if expires is None else expires
        start, identity, part = self._start, self._identity, self._part
        (before, after), padding, step = self._middle, self._padding, self._step
        table = digests.tobytes()
        at = 0
        for key, parent, position, life in zip(keys, parents, positions, expires, strict=True):
            place, end = position.to_bytes(4, "little"), life.to_bytes(4, "little")
            digest = table[at : at + step]
            middle = (place, before, end, after)
            data = b"".join((start, key, parent, identity, fill, part, *middle, digest, padding))
            yield data + _digest(data)
            at += step

    def read(
        self, headers: Iterable[bytes | memoryview], keys: Sequence[bytes]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """Verify n headers against this namespace and their keys.

        Returns which are good, and their segments' digests, uint64[n, segments, 2].
        """
        good, tables = [], []
        start, end = self._digests_at, self._digests_at + self._step
        for header, key in zip(headers, keys, strict=True):
            data = bytes(header[: self.header_bytes])
            good.append(
                data[24:56] == key
                and _digest(data[:-DIGEST_BYTES]) == data[-DIGEST_BYTES:]
                and data[:24] == self._start
                and data[88:120] == self._identity
                and data[136:144] == self._part
                and (data[148 : EXPIRES.start], data[EXPIRES.stop : start]) == self._middle
                and data[end:-DIGEST_BYTES] == self._padding
            )
            tables.append(data[start:end].ljust(self._step, b"\0"))  # a header may be cut short
        digests = np.frombuffer(b"".join(tables), dtype="<u8").reshape(
            len(good), len(self.segments), 2
        )
        return np.array(good, dtype=np.bool_), digests


def expires_of(frame: bytes | memoryview) -> int:
    """Return after which second since 1970 a frame is not used, NEVER where it always is.

    Nothing is verified; what is no frame never expires.
    """
    return int.from_bytes(frame[EXPIRES], "little") if frame[:4] == MAGIC else NEVER


def verify_payload(
    header: Header, payload: memoryview, start: int = 0, stop: int = PAYLOAD_BYTES_MAX
) -> list[int]:
    """Return the segments whose bytes do not match their digest, [] where all do.

    Only those that lie wholly between `start` and `stop` are looked at.
    """
    bad = []
    digests, digest = header.digests.tolist(), xxhash.xxh3_128_intdigest
    for index, (offset, nbytes) in enumerate(header.segments.tolist()):
        if offset < start or offset + nbytes > stop:
            continue
        data = payload[offset : offset + nbytes]
        low, high = digests[index]
        if len(data) != nbytes or digest(data) != high << 64 | low:
            bad.append(index)
    return bad


def digests_of(payload: memoryview, segments: Sequence[tuple[int, int]]) -> NDArray[np.uint64]:
    """Return uint64[segments, 2] of a payload cut at (offset, nbytes)."""
    mask = (1 << 64) - 1
    values = (xxhash.xxh3_128_intdigest(payload[at : at + size]) for at, size in segments)
    return np.array([(v & mask, v >> 64) for v in values], dtype=np.uint64).reshape(-1, 2)
