"""A directory of segment files: frames in slots of fixed stride, appended, found again by a scan.

    DIR/superblock        magic, version, UUID; its lock (flock) makes one process the owner
    DIR/tenants.json      secrets and epochs (kvengine.tenants)
    DIR/segments/N.seg    page 0: segment header; then slots of `stride` bytes each:
                          one page of slot header, then the frame, padded to pages

A slot header ties a frame to directory, segment, slot and the frame's own header, so a misdirected,
stale or half-written slot is not taken for a block. Whole segments go, the oldest first, when the
directory outgrows its size. A write counts only with its full byte count; any doubt on reading is
reported as a failure, and the block is dropped.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import xxhash

from kvengine import frame
from kvengine.errors import ConfigError, DirectoryInUse, FrameError
from kvengine.metrics import Metrics
from kvengine.tiers import Dropped, Held, Report, Span, verify
from kvengine.workers import Workers

PAGE_BYTES = 4096
VERSION = 0
SEGMENT_BYTES = 256 << 20
CLOSE_S = 30.0

_SUPER = struct.Struct("<8sH6x16s")
_SEGMENT = struct.Struct("<8sH6x16sQQQ")
_SLOT = struct.Struct("<8sH6xQQQQ32s32s16s")
_SUPER_MAGIC, _SEGMENT_MAGIC, _SLOT_MAGIC = b"KVEDISK\0", b"KVESEGM\0", b"KVESLOT\0"


@dataclass(slots=True)
class Segment:
    """One open segment file. `used` slots have been handed to writers."""

    number: int
    path: Path
    handle: int
    stride: int
    slots: int
    used: int = 0
    readers: int = 0
    gone: bool = False
    keys: dict[bytes, int] = field(default_factory=dict)


class Found(NamedTuple):
    """What a slot header says of its frame."""

    key: bytes
    identity: bytes
    frame_bytes: int


# What a write calls when it is over: the index of the span, and the segment that holds it or None.
Done = Callable[[int, Segment | None], None]


class DiskTier:
    """Frames in a directory of this machine. One process at a time; its threads may share it.

    Raises DirectoryInUse where another process (or engine) holds the directory, ConfigError where
    it holds something else or a newer version.
    """

    name = "disk"
    remote = False

    def __init__(
        self,
        path: Path,
        size_bytes: int,
        metrics: Metrics,
        dropped: Dropped,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        threads: int = 2,
        durable: bool = False,
    ) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._segment_bytes = min(segment_bytes, max(PAGE_BYTES, size_bytes // 4))
        self._metrics = metrics
        self._dropped = dropped
        self._durable = durable
        self._lock = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._open: dict[int, Segment] = {}
        self._where: dict[bytes, Segment] = {}
        self._held: list[Found] = []
        self._nbytes = 0
        self._allocated = 0
        self._next = 1
        self._closed = False
        try:
            (path / "segments").mkdir(parents=True, exist_ok=True)
            self._super, self._uuid = _own(path / "superblock")
        except DirectoryInUse:
            raise
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be used ({error.strerror}): give a directory that this user may "
                "write, on a disk with room"
            ) from error
        try:
            self._recover()
        except BaseException:
            self.detach()
            raise
        self._workers = Workers(threads, "kvengine-disk", self._failed)

    @property
    def nbytes(self) -> int:
        """Bytes of frames held."""
        return self._nbytes

    @property
    def count(self) -> int:
        """Number of frames held."""
        return len(self._where)

    def scan(self) -> Iterator[Held]:
        """Yield the frames found at opening, once."""
        groups: dict[tuple[bytes, int], list[bytes]] = {}
        for key, identity, frame_bytes in self._held:
            groups.setdefault((identity, frame_bytes), []).append(key)
        self._held = []
        for (identity, frame_bytes), keys in groups.items():
            table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
            yield Held(table, identity, frame_bytes)

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        """Return the size of each key's slot, 0 for none. Known at once."""
        with self._lock:
            held = [self._where.get(key) for key in keys]
            return [0 if segment is None else segment.stride - PAGE_BYTES for segment in held]

    def read(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue reads, one piece of work a frame; each is reported when its bytes are there."""
        for index, span in enumerate(spans):
            if not self._workers.submit(partial(self._read, index, span, deadline, report)):
                report(index, False)

    def write(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue writes, one piece of work a frame; in durable mode one sync for the table."""
        left = [len(spans)]
        results: list[tuple[int, Segment | None]] = []

        def done(index: int, segment: Segment | None) -> None:
            with self._lock:
                results.append((index, segment))
                left[0] -= 1
                last = left[0] == 0
            if not self._durable:
                report(index, segment is not None)
            elif last:
                self._sync(results, spans, report)

        for index, span in enumerate(spans):
            if not self._workers.submit(partial(self._write, index, span, deadline, done)):
                done(index, None)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget keys. Their space comes back with their segment."""
        for key in keys:
            with self._lock:
                slot = self._forget(key)
            if slot is not None:
                self._workers.submit(partial(self._blank, *slot))

    def close(self) -> None:
        """Finish what is queued, sync, close the files, let go of the lock."""
        if self._closed:
            return
        self._closed = True
        if not self._workers.close(CLOSE_S):
            return  # a thread hangs in the disk: a closed descriptor could become another file's
        for segment in self._segments.values():
            try:
                os.fdatasync(segment.handle)
            except OSError as error:
                self._failed(error)
        self._let_go()

    def detach(self) -> None:
        """After a fork, in the child: close descriptors. The parent keeps the lock."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        for segment in self._segments.values():
            if segment.handle >= 0:
                os.close(segment.handle)
        self._segments, self._open, self._where = {}, {}, {}
        os.close(self._super)

    def _failed(self, error: Exception) -> None:
        self._metrics.add("tier_failures", 1, tier=self.name)

    def _read(self, index: int, span: Span, deadline: float, report: Report) -> None:
        good = False
        try:
            good = time.monotonic() < deadline and self._read_frame(span)
        except OSError as error:
            self._failed(error)
            self._give_up(span.key)
        finally:
            report(index, good)

    def _read_frame(self, span: Span) -> bool:
        with self._lock:
            segment = self._where.get(span.key)
            if segment is not None:
                slot = segment.keys[span.key]
                segment.readers += 1
        if segment is None:
            self._dropped([span.key])
            return False
        try:
            want = _pages(span.nbytes)
            head = mmap.mmap(-1, PAGE_BYTES)
            offset = PAGE_BYTES + slot * segment.stride
            got = os.preadv(segment.handle, [head, span.frame[:want]], offset)
            self._check(head[:], segment, slot, span.key)
            if got < PAGE_BYTES + span.nbytes:
                raise FrameError(f"read {got} bytes of {PAGE_BYTES + span.nbytes}")
            verify(span)
            return True
        except FrameError:
            self._metrics.add("corrupt_blocks", 1, tier=self.name)
            self._give_up(span.key)
            return False
        finally:
            with self._lock:
                segment.readers -= 1
                self._bury(segment)

    def _give_up(self, key: bytes) -> None:
        """Forget a block that cannot be read, here and above: it is to be computed again."""
        self.drop([key])
        self._dropped([key])

    def _write(
        self,
        index: int,
        span: Span,
        deadline: float,
        done: Done,
    ) -> None:
        segment = None
        try:
            if time.monotonic() < deadline:
                segment = self._write_frame(span)
        except OSError as error:
            self._failed(error)
        finally:
            done(index, segment)

    def _write_frame(self, span: Span) -> Segment | None:
        want = _pages(span.nbytes)
        with self._lock:
            if span.key in self._where:
                return self._where[span.key]
            segment = self._room(PAGE_BYTES + want)
            if segment is None:
                return None
            slot = segment.used
            segment.used += 1
            segment.readers += 1
        try:
            page = self._slot_header(segment, slot, span)
            offset = PAGE_BYTES + slot * segment.stride
            put = os.pwritev(segment.handle, [page, span.frame[:want]], offset)
            if put != PAGE_BYTES + want:
                self._metrics.add("tier_failures", 1, tier=self.name)
                return None
            with self._lock:
                if segment.gone or span.key in self._where:
                    return None
                segment.keys[span.key] = slot
                self._where[span.key] = segment
                self._nbytes += segment.stride - PAGE_BYTES
            return segment
        finally:
            with self._lock:
                segment.readers -= 1
                self._bury(segment)

    def _sync(
        self,
        results: Sequence[tuple[int, Segment | None]],
        spans: Sequence[Span],
        report: Report,
    ) -> None:
        good: dict[int, bool] = {}
        for segment in {s.number: s for _, s in results if s is not None}.values():
            try:
                os.fdatasync(segment.handle)
                good[segment.number] = True
            except OSError as error:
                # The kernel may have thrown the pages away: nothing of this table counts.
                self._failed(error)
                good[segment.number] = False
                self.drop([spans[i].key for i, s in results if s is segment])
        for index, written in results:
            report(index, written is not None and good.get(written.number, False))

    def _slot_header(self, segment: Segment, slot: int, span: Span) -> mmap.mmap:
        digest = frame.header_digest(span.frame)
        identity = bytes(span.frame[88:120])
        fixed = _SLOT.pack(
            _SLOT_MAGIC,
            VERSION,
            segment.number,
            slot,
            span.nbytes,
            0,
            span.key,
            identity,
            digest,
        )
        page = mmap.mmap(-1, PAGE_BYTES)
        page[: len(fixed)] = fixed
        page[PAGE_BYTES - 16 :] = self._tie(page[: PAGE_BYTES - 16])
        return page

    def _tie(self, lead: bytes) -> bytes:
        """Digest a slot header's page, padding included, as one of this directory."""
        return xxhash.xxh3_128_digest(self._uuid + lead)

    def _check(self, page: bytes, segment: Segment, slot: int, key: bytes) -> None:
        found = self._slot(page, segment, slot)
        if found is None or found.key != key:
            raise FrameError("a slot header that does not belong here")

    def _slot(self, page: bytes, segment: Segment, slot: int) -> Found | None:
        if len(page) < PAGE_BYTES or self._tie(page[:-16]) != page[-16:]:
            return None
        magic, version, number, place, nbytes, _, key, identity, _ = _SLOT.unpack_from(page)
        if (magic, version, number, place) != (_SLOT_MAGIC, VERSION, segment.number, slot):
            return None
        if nbytes > segment.stride - PAGE_BYTES:
            return None
        return Found(key, identity, nbytes)

    def _room(self, stride: int) -> Segment | None:
        """Return a segment with a free slot, or None where the disk gives none."""
        segment = self._open.get(stride)
        if segment is not None and segment.used < segment.slots:
            return segment
        slots = max(1, (self._segment_bytes - PAGE_BYTES) // stride)
        nbytes = PAGE_BYTES + slots * stride
        if nbytes > self._size_bytes:
            return None
        while self._allocated + nbytes > self._size_bytes:
            if not self._evict():
                return None
        number, self._next = self._next, self._next + 1
        path = self._path / "segments" / f"{number:08d}.seg"
        handle = -1
        try:
            handle = _open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.posix_fallocate(handle, 0, nbytes)
            page = mmap.mmap(-1, PAGE_BYTES)
            fixed = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, self._uuid, number, stride, slots)
            page[: len(fixed)] = fixed
            page[PAGE_BYTES - 16 :] = xxhash.xxh3_128_digest(fixed)
            if os.pwritev(handle, [page], 0) != PAGE_BYTES:
                raise OSError("a short write")
        except OSError as error:
            self._failed(error)
            if handle >= 0:
                os.close(handle)
                path.unlink(missing_ok=True)
            return None
        made = Segment(number, path, handle, stride, slots)
        self._segments[number] = made
        self._open[stride] = made
        self._allocated += nbytes
        return made

    def _evict(self) -> bool:
        """Give up the oldest segment. False where there is none."""
        if not self._segments:
            return False
        segment = self._segments.pop(min(self._segments))
        segment.gone = True
        self._allocated -= PAGE_BYTES + segment.slots * segment.stride
        if self._open.get(segment.stride) is segment:
            del self._open[segment.stride]
        keys = list(segment.keys)
        for key in keys:
            self._forget(key)
        self._metrics.add("evicted_blocks", len(keys), reason="disk size")
        segment.path.unlink(missing_ok=True)
        self._bury(segment)
        if keys:
            # On a thread of ours, so that the store's lock is never taken under our own.
            self._workers.submit(lambda: self._dropped(keys))
        return True

    def _bury(self, segment: Segment) -> None:
        if segment.gone and segment.readers == 0 and segment.handle >= 0:
            os.close(segment.handle)
            segment.handle = -1

    def _forget(self, key: bytes) -> tuple[Segment, int] | None:
        """Let no read find a key. Returns its slot, which still holds the bytes."""
        segment = self._where.pop(key, None)
        if segment is None:
            return None
        self._nbytes -= segment.stride - PAGE_BYTES
        return segment, segment.keys.pop(key)

    def _blank(self, segment: Segment, slot: int) -> None:
        """Overwrite a slot header, so that the next scan does not bring its block back."""
        with self._lock:
            if segment.gone:
                return
            segment.readers += 1
        try:
            offset = PAGE_BYTES + slot * segment.stride
            os.pwritev(segment.handle, [mmap.mmap(-1, PAGE_BYTES)], offset)
        except OSError as error:
            self._failed(error)
        finally:
            with self._lock:
                segment.readers -= 1
                self._bury(segment)

    def _recover(self) -> None:
        """Open the segments and read their slot headers. Damaged slots are left out."""
        held: dict[bytes, Found] = {}
        for path in sorted((self._path / "segments").glob("*.seg")):
            segment = self._open_segment(path)
            if segment is None:
                self._metrics.add("tier_failures", 1, tier=self.name)
                continue
            self._segments[segment.number] = segment
            self._allocated += PAGE_BYTES + segment.slots * segment.stride
            self._next = max(self._next, segment.number + 1)
            for slot, page in self._headers(segment):
                segment.used = slot + 1
                found = self._slot(page, segment, slot)
                if found is None:
                    self._metrics.add("corrupt_blocks", 1, tier=self.name)
                    continue
                self._forget(found.key)
                segment.keys[found.key] = slot
                self._where[found.key] = segment
                self._nbytes += segment.stride - PAGE_BYTES
                held[found.key] = found
            if segment.used < segment.slots:
                self._open[segment.stride] = segment
        self._held = list(held.values())

    def _headers(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield the written slots' first pages, to the last that is not blank."""
        blank = bytes(PAGE_BYTES)
        pages: list[tuple[int, bytes]] = []
        page = mmap.mmap(-1, PAGE_BYTES)
        for slot in range(segment.slots):
            try:
                got = os.preadv(segment.handle, [page], PAGE_BYTES + slot * segment.stride)
            except OSError as error:
                self._failed(error)
                pages.append((slot, b""))  # damaged: not to be written to again
                continue
            if got < PAGE_BYTES:
                break
            data = page[:]
            if data != blank:
                pages.append((slot, data))
        yield from pages

    def _open_segment(self, path: Path) -> Segment | None:
        try:
            handle = _open_direct(path, os.O_RDWR)
        except OSError:
            return None
        page = mmap.mmap(-1, PAGE_BYTES)
        try:
            got = os.preadv(handle, [page], 0)
        except OSError:
            got = 0
        fixed = page[: _SEGMENT.size]
        _, version, owner, number, stride, slots = _SEGMENT.unpack(fixed)
        good = (
            got == PAGE_BYTES
            and xxhash.xxh3_128_digest(fixed) == page[PAGE_BYTES - 16 :]
            and version == VERSION
            and owner == self._uuid
            and path.name == f"{number:08d}.seg"
        )
        if not good:
            os.close(handle)
            return None
        return Segment(number, path, handle, stride, slots)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _open_direct(path: Path, flags: int) -> int:
    """Open past the page cache where the file system can, else through it."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(path, (flags & ~os.O_EXCL) | os.O_CLOEXEC, 0o600)


def _own(path: Path) -> tuple[int, bytes]:
    """Lock the superblock, write it if it is new; return its descriptor and the UUID."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise DirectoryInUse(
            f"{path.parent} is held by another process or engine: close that one, or give this "
            "one a directory of its own"
        ) from error
    data = os.pread(handle, PAGE_BYTES, 0)
    if not data:
        fixed = _SUPER.pack(_SUPER_MAGIC, VERSION, uuid.uuid4().bytes)
        page = fixed.ljust(PAGE_BYTES - 16, b"\0") + xxhash.xxh3_128_digest(fixed)
        os.pwrite(handle, page, 0)
        os.fsync(handle)
        data = page
    if len(data) < PAGE_BYTES or data[:8] != _SUPER_MAGIC:
        _refuse(handle, f"{path} is not a kvengine superblock: give an empty directory")
    magic, version, owner = _SUPER.unpack(data[: _SUPER.size])
    if version != VERSION:
        _refuse(handle, f"{path} has format version {version}, this kvengine writes {VERSION}")
    if xxhash.xxh3_128_digest(data[: _SUPER.size]) != data[PAGE_BYTES - 16 : PAGE_BYTES]:
        _refuse(handle, f"{path} is damaged: restore it, or remove the directory")
    return handle, owner


def _refuse(handle: int, reason: str) -> NoReturn:
    os.close(handle)
    raise ConfigError(reason)
