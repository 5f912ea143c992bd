"""What stands on a disk tier's pages: superblock, segment header, footer, slot header.

    DIR/superblock        two pages, each the whole of it; the later incarnation counts
    DIR/segments/N.seg    page 0    segment header
                          page 1    footer: how much of the segment its table covers, and its digest
                          pages     the footer's table: an entry of 88 bytes for each slot
                          slots     of `stride` bytes each: a page of slot header, then the frame

A page ends with the xxh3-128 of all its bytes before that, so it is whole or nothing. All but the
superblock name the directory (UUID), the segment and its generation: a segment that is used again
gets a new one, so nothing that an earlier life has left is taken for its own. A slot header names
the slot too, and the digest in the header of its frame, which has the digests of the payload: a
misdirected, stale, torn or half-written block fails at one of these. The footer is written last,
but stands in front, so that one read finds it. All integers are little-endian.

A number drawn by a writer (generation, sequence) is its incarnation << 32 | a count. An incarnation
is on the disk before its first number is, so none is ever drawn twice.
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

PAGE_BYTES = 4096
VERSION = 1
PLAIN, AES_256_GCM = 0, 1  # ciphers
BLOCK, DROPPED = 1, 2
DIGEST_BYTES = 16

_SUPER = struct.Struct("<8sH6x16sQQQ")
_SEGMENT = struct.Struct("<8sH6x16sQQQQ")
_FOOTER = struct.Struct("<8sH6x16sQQQQQ16s")
_SLOT = struct.Struct("<8sHH4x16sQQQQQ32s32s16s")
_SUPER_MAGIC, _SEGMENT_MAGIC = b"KVEDISK\0", b"KVESEGM\0"
_FOOTER_MAGIC, _SLOT_MAGIC = b"KVEFOOT\0", b"KVESLOT\0"

# A footer's entry. Sequence 0: nothing in this slot.
ENTRY = np.dtype(
    [
        ("key", "u1", 32),
        ("identity", "u1", 32),
        ("frame_bytes", "<u8"),
        ("sequence", "<u8"),
        ("blank", "<u8"),
    ]
)


def blank_page() -> mmap.mmap:
    """Return a page of zeros, aligned as a disk wants it."""
    return mmap.mmap(-1, PAGE_BYTES)


def pages(nbytes: int) -> int:
    """Round up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _page(fixed: bytes) -> mmap.mmap:
    data = fixed.ljust(PAGE_BYTES - DIGEST_BYTES, b"\0")
    page = blank_page()
    page[:] = data + xxhash.xxh3_128_digest(data)
    return page


def _fixed(page: bytes, layout: struct.Struct, magic: bytes) -> bytes | None:
    """Return a page's fields where it is whole and of this kind."""
    if len(page) != PAGE_BYTES or page[:8] != magic:
        return None
    if xxhash.xxh3_128_digest(page[:-DIGEST_BYTES]) != page[-DIGEST_BYTES:]:
        return None
    return page[: layout.size]


class Superblock(NamedTuple):
    """Whose directory this is. Raises nothing: what is damaged reads as None."""

    uuid: bytes
    incarnation: int
    cipher: int = PLAIN
    page_bytes: int = PAGE_BYTES
    version: int = VERSION

    def page(self) -> mmap.mmap:
        """Lay out."""
        return _page(
            _SUPER.pack(
                _SUPER_MAGIC,
                self.version,
                self.uuid,
                self.incarnation,
                self.page_bytes,
                self.cipher,
            )
        )

    @classmethod
    def read(cls, page: bytes) -> Superblock | None:
        """Read; of any version, so that a newer one can be refused by name."""
        fixed = _fixed(page, _SUPER, _SUPER_MAGIC)
        if fixed is None:
            return None
        _, version, owner, incarnation, page_bytes, cipher = _SUPER.unpack(fixed)
        return cls(owner, incarnation, cipher, page_bytes, version)


class Geometry(NamedTuple):
    """How a segment file is cut."""

    stride: int
    slots: int

    @property
    def slots_at(self) -> int:
        """Where the first slot begins."""
        return 2 * PAGE_BYTES + pages(ENTRY.itemsize * self.slots)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.slots_at + self.slots * self.stride

    def offset(self, slot: int) -> int:
        """Where a slot begins."""
        return self.slots_at + slot * self.stride

    @classmethod
    def fitting(cls, stride: int, segment_bytes: int) -> Geometry:
        """Cut a segment of about so many bytes, at least one slot."""
        slots = max(1, (segment_bytes - 3 * PAGE_BYTES) // (stride + ENTRY.itemsize))
        return cls(stride, slots)


class SegmentHeader(NamedTuple):
    """Which life of which segment file this is."""

    uuid: bytes
    number: int
    generation: int
    stride: int
    slots: int

    def page(self) -> mmap.mmap:
        """Lay out."""
        return _page(_SEGMENT.pack(_SEGMENT_MAGIC, VERSION, *self))

    @classmethod
    def read(cls, page: bytes) -> SegmentHeader | None:
        """Read."""
        fixed = _fixed(page, _SEGMENT, _SEGMENT_MAGIC)
        if fixed is None:
            return None
        _, version, *rest = _SEGMENT.unpack(fixed)
        return cls(*rest) if version == VERSION else None


class Footer(NamedTuple):
    """How many slots the table covers: what is behind those is found by a scan."""

    uuid: bytes
    number: int
    generation: int
    stride: int
    slots: int
    used: int
    digest: bytes

    @property
    def header(self) -> SegmentHeader:
        """The header of the same segment, should its own be damaged."""
        return SegmentHeader(*self[:5])

    def page(self) -> mmap.mmap:
        """Lay out."""
        return _page(_FOOTER.pack(_FOOTER_MAGIC, VERSION, *self))

    @classmethod
    def read(cls, page: bytes) -> Footer | None:
        """Read; the table is still to be compared with `digest`."""
        fixed = _fixed(page, _FOOTER, _FOOTER_MAGIC)
        if fixed is None:
            return None
        _, version, *rest = _FOOTER.unpack(fixed)
        return cls(*rest) if version == VERSION else None


def table_digest(table: bytes | memoryview) -> bytes:
    """Return what a footer holds of its table."""
    return xxhash.xxh3_128_digest(table)


def table_of(data: bytes, slots: int) -> NDArray[np.void]:
    """Read a footer's table into ENTRY[slots], writable."""
    return np.frombuffer(data, dtype=ENTRY, count=slots).copy()


class SlotHeader(NamedTuple):
    """Which block lies in a slot, as its frame says in its own header; or that it was dropped."""

    kind: int
    uuid: bytes
    number: int
    generation: int
    slot: int
    sequence: int
    frame_bytes: int
    key: bytes
    identity: bytes
    frame_digest: bytes

    def page(self) -> mmap.mmap:
        """Lay out."""
        return _page(_SLOT.pack(_SLOT_MAGIC, VERSION, *self))

    @classmethod
    def read(cls, page: bytes) -> SlotHeader | None:
        """Read."""
        fixed = _fixed(page, _SLOT, _SLOT_MAGIC)
        if fixed is None:
            return None
        _, version, *rest = _SLOT.unpack(fixed)
        return cls(*rest) if version == VERSION else None
