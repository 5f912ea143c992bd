"""The files of a disk tier: made, written, read, sealed, found again. Knows pages, not policies.

Nothing here locks: the tier's books say who may write which slot. All verbs raise OSError where
the disk does, and FrameError where what it gives is not what was written.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from kvengine import frame
from kvengine.compiled import Int32s
from kvengine.errors import ConfigError, FrameError
from kvengine.tiers.files import Files, Handles, whole
from kvengine.tiers.format import (
    AES_256_GCM,
    BLOCK,
    DROPPED,
    ENTRY,
    PAGE_BYTES,
    PLAIN,
    VERSION,
    Footer,
    Geometry,
    SegmentHeader,
    SlotHeader,
    Superblock,
    blank_page,
    pages,
    table_digest,
    table_of,
)

CIPHERS = MappingProxyType({PLAIN: "plain", AES_256_GCM: "sealed"})
NAME = re.compile(r"(\d{8})\.seg")
SCAN_BYTES = 512 << 10  # slots of a quarter of it or more are read by their headers alone
FRONT_BYTES = 64 << 10  # header, footer and table of most segments, in one read
NOBODY = -1
_BLANK = bytes(PAGE_BYTES)


class Segment:
    """One segment file. `used` slots have been handed to writers.

    `ids` says which entry of the tier's books lies in a slot (NOBODY: none), `touched` which was
    read since it was written. `table` is what its footer will say, until it is sealed; `amiss` that
    the footer names blocks which have been dropped since.
    """

    __slots__ = (
        "number",
        "path",
        "generation",
        "geometry",
        "used",
        "writing",
        "readers",
        "gone",
        "ids",
        "touched",
        "table",
        "amiss",
        "promised",
    )

    def __init__(self, number: int, path: Path, generation: int, geometry: Geometry) -> None:
        self.number = number
        self.path = path
        self.generation = generation
        self.geometry = geometry
        self.used = 0
        self.writing = 0
        self.readers = 0
        self.promised = False
        self.gone = False
        self.amiss = False
        self.ids: Int32s = np.full(geometry.slots, NOBODY, dtype=np.int32)
        self.touched: NDArray[np.bool_] = np.zeros(geometry.slots, dtype=np.bool_)
        self.table: NDArray[np.void] | None = np.zeros(geometry.slots, dtype=ENTRY)

    @property
    def full(self) -> bool:
        """Whether every slot has been handed out."""
        return self.used == self.geometry.slots


class Segments:
    """The segment files of one directory, and its superblock, which names the `cipher`."""

    def __init__(
        self, files: Files, folder: Path, count: Callable[[str], None], cipher: int = PLAIN
    ) -> None:
        self._files = files
        self._folder = folder
        self._count = count
        self._home = folder / "segments"
        self._handles = Handles(files)
        self._uuid = b""
        self.cipher = cipher

    def own(self) -> int:
        """Read the superblock, or make one; write it as a new incarnation, which is returned.

        The directory is locked. Raises ConfigError for what is not ours to write.
        """
        path = self._folder / "superblock"
        self._files.make_folder(self._home)
        if path.name not in self._files.names(self._folder):
            fresh = path.with_suffix(".new")
            self._files.remove(fresh)
            page = Superblock(os.urandom(16), 0, self.cipher).page()
            with self._handles.of(fresh, create=True) as handle:
                self._all(whole(self._files.write, handle, [page, page], 0), 2 * PAGE_BYTES)
                self._files.sync(handle)
            self._handles.forget(fresh)
            self._files.rename(fresh, path)
            for folder in (self._folder, self._folder.parent):
                self._files.sync_folder(folder)
        with self._handles.of(path) as handle:
            at, found = self._superblock(handle, path)
            if found.cipher != self.cipher:
                raise ConfigError(
                    f"{self._folder} holds {CIPHERS[found.cipher]} blocks, and disk.encrypt asks "
                    f"for {CIPHERS[self.cipher]} ones: change it, or give another directory"
                )
            # The older page is written, the newer stays whole whatever happens.
            found = found._replace(incarnation=found.incarnation + 1)
            self._all(whole(self._files.write, handle, [found.page()], at), PAGE_BYTES)
            self._files.sync(handle)
        self._uuid = found.uuid
        return found.incarnation

    def touch(self) -> None:
        """Read and sync the superblock, to see if the disk does. Raises OSError where not."""
        with self._handles.of(self._folder / "superblock") as handle:
            whole(self._files.read, handle, [blank_page()], 0)
            self._files.sync(handle)

    def look(self) -> None:
        """Read the superblock, to read segments only. Raises ConfigError where there is none."""
        path = self._folder / "superblock"
        try:
            with self._handles.of(path) as handle:
                found = self._superblock(handle, path)[1]
                self._uuid, self.cipher = found.uuid, found.cipher
        except FileNotFoundError as error:
            raise ConfigError(
                f"{self._folder} is no directory of kvengine's: it has no superblock"
            ) from error

    def _superblock(self, handle: int, path: Path) -> tuple[int, Superblock]:
        """Return the superblock that counts, and where the other page stands."""
        there = [self._super(handle, at) for at in (0, PAGE_BYTES)]
        found = max((each for each in there if each), key=lambda s: s.incarnation, default=None)
        if found is None:
            raise ConfigError(
                f"{path} is not a kvengine superblock, or is damaged: give another directory, "
                "or remove this one"
            )
        if found.version != VERSION or found.page_bytes != PAGE_BYTES:
            raise ConfigError(
                f"{path} has format version {found.version}, this kvengine writes {VERSION}: "
                "open it with the one that made it, or remove the directory"
            )
        if found.cipher not in CIPHERS:
            raise ConfigError(f"{path} is sealed with cipher {found.cipher}, not known here")
        if None in there:
            self._count("corrupt_blocks")
        return PAGE_BYTES if there[0] is found else 0, found

    def _super(self, handle: int, at: int) -> Superblock | None:
        page = blank_page()
        try:
            got = whole(self._files.read, handle, [page], at)
        except OSError:
            return None
        return Superblock.read(page[:got])

    def create(self, number: int, generation: int, geometry: Geometry, *, durable: bool) -> Segment:
        """Make a new file. Leaves nothing behind where the disk refuses."""
        path = self._home / f"{number:08d}.seg"
        made = Segment(number, path, generation, geometry)
        try:
            with self._handles.of(path, create=True) as handle:
                self._files.allocate(handle, geometry.nbytes)
                self._write_header(handle, made)
            if durable:
                self._files.sync_folder(self._home)
                made.promised = True
        except OSError:
            self._handles.forget(path)
            self._files.remove(path)
            raise
        return made

    def renew(self, old: Segment, generation: int) -> Segment:
        """Begin a file anew under another generation. Nobody reads or writes the old one."""
        made = Segment(old.number, old.path, generation, old.geometry)
        with self._handles.of(made.path) as handle:
            self._write_header(handle, made)
        made.promised = old.promised
        return made

    def _write_header(self, handle: int, segment: Segment) -> None:
        page = SegmentHeader(
            self._uuid, segment.number, segment.generation, *segment.geometry
        ).page()
        self._all(whole(self._files.write, handle, [page], 0), PAGE_BYTES)

    def write(
        self, segment: Segment, slot: int, sequence: int, data: memoryview, frame_bytes: int
    ) -> SlotHeader:
        """Write a frame behind its slot header. It counts only if this returns."""
        key, identity = bytes(data[24:56]), bytes(data[88:120])
        digest = frame.header_digest(data)
        header = self._slot_header(segment, slot, sequence)._replace(
            frame_bytes=frame_bytes, key=key, identity=identity, frame_digest=digest
        )
        want = pages(frame_bytes)
        offset = segment.geometry.offset(slot)
        with self._handles.of(segment.path) as handle:
            put = whole(self._files.write, handle, [header.page(), data[:want]], offset)
        self._all(put, PAGE_BYTES + want)
        return header

    def read(
        self,
        segment: Segment,
        slot: int,
        sequence: int,
        target: memoryview,
        want: int | None = None,
    ) -> SlotHeader:
        """Read a frame, or its first bytes, into whole pages; the caller verifies the payload.

        Raises FrameError where the slot holds anything but what was written to it, or less than
        `want` bytes (None: the frame) are there.
        """
        page = blank_page()
        offset = segment.geometry.offset(slot)
        with self._handles.of(segment.path) as handle:
            got = whole(self._files.read, handle, [page, target], offset)
        found = SlotHeader.read(page[:])
        if found is None or not self._belongs(found, segment, slot) or found.sequence != sequence:
            raise FrameError("a slot header that does not belong here")
        if found.kind == BLOCK:
            want = found.frame_bytes if want is None else want
            if min(got - PAGE_BYTES, len(target)) < want:
                raise FrameError(f"read {got} bytes, expected {want}")
            if found.frame_digest != frame.header_digest(target[: found.frame_bytes]):
                raise FrameError("a frame that is not the one its slot header names")
        return found

    def read_on(
        self, segment: Segment, slot: int, target: memoryview, start: int, want: int
    ) -> None:
        """Read pages from byte `start` of a frame on. Raises FrameError where `want` are not."""
        offset = segment.geometry.offset(slot) + PAGE_BYTES + start
        with self._handles.of(segment.path) as handle:
            got = whole(self._files.read, handle, [target], offset)
        if got < want:
            raise FrameError(f"read {got} bytes, expected {want}")

    def blank(self, segment: Segment, slot: int, sequence: int) -> None:
        """Write over a slot header that its block was dropped, so that no scan brings it back."""
        page = self._slot_header(segment, slot, sequence)._replace(kind=DROPPED).page()
        with self._handles.of(segment.path) as handle:
            whole(self._files.write, handle, [page], segment.geometry.offset(slot))

    def _slot_header(self, segment: Segment, slot: int, sequence: int) -> SlotHeader:
        place = (self._uuid, segment.number, segment.generation, slot, sequence)
        return SlotHeader(BLOCK, *place, 0, bytes(32), bytes(32), bytes(16))

    def _belongs(self, found: SlotHeader, segment: Segment, slot: int) -> bool:
        place = (self._uuid, segment.number, segment.generation, slot)
        return found[1:5] == place and found.frame_bytes <= segment.geometry.stride - PAGE_BYTES

    def sync(self, segment: Segment) -> None:
        """Return once all that was written to a segment survives a loss of power."""
        with self._handles.of(segment.path) as handle:
            self._files.sync(handle)

    def promise(self, segment: Segment) -> None:
        """Sync a segment, and its name where that is not known to have been."""
        self.sync(segment)
        if not segment.promised:
            self._files.sync_folder(self._home)
            segment.promised = True

    def seal(self, segment: Segment) -> None:
        """Sync a segment, then write its footer. It may be written to afterwards, and sealed again.

        An OSError of the sync means that nothing of the segment can be trusted.
        """
        self.sync(segment)
        assert segment.table is not None
        size = segment.geometry.slots_at - PAGE_BYTES
        front = mmap.mmap(-1, size)
        table = segment.table.tobytes()
        front[PAGE_BYTES : PAGE_BYTES + len(table)] = table
        digest = table_digest(front[PAGE_BYTES:])
        place = (self._uuid, segment.number, segment.generation, *segment.geometry)
        front[:PAGE_BYTES] = Footer(*place, segment.used, digest).page()[:]
        try:
            with self._handles.of(segment.path) as handle:
                self._all(whole(self._files.write, handle, [front], PAGE_BYTES), size)
        except OSError:
            self._count("tier_failures")  # the next opening scans this segment

    def mend(self, segment: Segment) -> None:
        """Write header and footer anew, from what has been found."""
        with self._handles.of(segment.path) as handle:
            self._write_header(handle, segment)
        self.seal(segment)

    def unseal(self, segment: Segment) -> None:
        """Take a footer back: the next opening scans the slots."""
        try:
            with self._handles.of(segment.path) as handle:
                whole(self._files.write, handle, [blank_page()], PAGE_BYTES)
        except OSError:
            self._count("tier_failures")

    def remove(self, segment: Segment) -> None:
        """Give a file up; those who still read it may."""
        self._handles.forget(segment.path)
        self._files.remove(segment.path)

    def close(self) -> None:
        """Close all files."""
        self._handles.close()

    def detach(self) -> None:
        """After a fork, in the child: close all files."""
        self._handles.detach()

    # Found again

    def names(self) -> list[str]:
        """Name the files that are, or look like, segments."""
        return sorted(name for name in self._files.names(self._home) if NAME.fullmatch(name))

    def load(self, name: str) -> Segment:
        """Read a segment's header and footer, scan what the footer does not cover.

        A file that holds nothing of this directory is a Segment of generation 0 without blocks.
        """
        path = self._home / name
        number = int(name[:8])
        with self._handles.of(path) as handle:
            nbytes = self._files.size(handle)
            front = self._front(handle, min(FRONT_BYTES, pages(nbytes)))
            header = SegmentHeader.read(front[:PAGE_BYTES])
            footer = Footer.read(front[PAGE_BYTES : 2 * PAGE_BYTES])
            damaged = header is None or header[:2] != (self._uuid, number)
            if damaged:
                self._count("corrupt_blocks")
                header = footer.header if footer is not None else None
            if header is None or header[:2] != (self._uuid, number) or header.slots > nbytes:
                waste = Segment(number, path, 0, Geometry(nbytes, 1))
                waste.used = 1
                return waste
            geometry = Geometry(header.stride, header.slots)
            made = Segment(number, path, header.generation, geometry)
            if footer is not None and footer.header == header:
                self._read_table(handle, made, front, footer)
            elif front[PAGE_BYTES : 2 * PAGE_BYTES] != _BLANK and footer is None:
                self._count("corrupt_blocks")
            if not made.full:
                self._scan(handle, made)
            if damaged:
                made.used = made.geometry.slots  # read, but not written to
        self._handles.forget(path)
        return made

    def _front(self, handle: int, nbytes: int) -> bytes:
        if not nbytes:
            return b""
        front = mmap.mmap(-1, nbytes)
        got = whole(self._files.read, handle, [front], 0)
        return front[:got]

    def _read_table(self, handle: int, segment: Segment, front: bytes, footer: Footer) -> None:
        end = segment.geometry.slots_at
        if len(front) < end:
            front = self._front(handle, end)
        data = front[2 * PAGE_BYTES : end]
        if table_digest(data) != footer.digest:
            self._count("corrupt_blocks")
            return
        segment.table = table_of(data, segment.geometry.slots)
        segment.used = footer.used

    def _pages(self, handle: int, segment: Segment) -> Iterator[tuple[int, bytes | None]]:
        """Yield each slot from `used` on and the page of its header, None where it is not read.

        Small slots are read many at a time, since a disk takes as long for a page as for dozens.
        """
        geometry = segment.geometry
        step = SCAN_BYTES // geometry.stride if geometry.stride <= SCAN_BYTES // 4 else 1
        room = mmap.mmap(-1, (step - 1) * geometry.stride + PAGE_BYTES)
        for first in range(segment.used, geometry.slots, step):
            slots = range(first, min(first + step, geometry.slots))
            got = self._peek(handle, room, geometry.offset(first))
            for slot in slots:
                at = (slot - first) * geometry.stride
                if got < 0 and step > 1:
                    again = self._peek(handle, page := blank_page(), geometry.offset(slot))
                    yield slot, None if again < 0 else page[:again]
                else:
                    yield slot, None if got < 0 else room[at : min(at + PAGE_BYTES, max(at, got))]

    def _peek(self, handle: int, room: mmap.mmap, offset: int) -> int:
        """Return how many bytes were read, -1 where the disk refuses."""
        try:
            return whole(self._files.read, handle, [room], offset)
        except OSError:
            return -1

    def _scan(self, handle: int, segment: Segment) -> None:
        """Read the slot headers from `used` on, to the last that was written."""
        assert segment.table is not None
        for slot, data in self._pages(handle, segment):
            if data is None:
                self._count("tier_failures")
                segment.used = slot + 1  # damaged: not to be written to again
                continue
            found = SlotHeader.read(data)
            if found is None:
                if data != _BLANK and data:
                    self._count("corrupt_blocks")
                    segment.used = slot + 1
                continue
            if not self._belongs(found, segment, slot):
                # Left by an earlier life of the file, or by a write that went astray.
                stale = found[1:3] == (self._uuid, segment.number) and found.slot == slot
                if not stale or found.generation > segment.generation:
                    self._count("corrupt_blocks")
                    segment.used = slot + 1
                continue
            segment.used = slot + 1
            if found.kind == BLOCK:
                entry = segment.table[slot]
                entry["key"] = np.frombuffer(found.key, dtype=np.uint8)
                entry["identity"] = np.frombuffer(found.identity, dtype=np.uint8)
                entry["frame_bytes"] = found.frame_bytes
                entry["sequence"] = found.sequence

    @staticmethod
    def _all(put: int, want: int) -> None:
        if put != want:
            raise OSError(f"a short write: {put} of {want} bytes")
