"""A directory of segment files: frames in slots of fixed stride, appended, found again by footers.

    DIR/lock              its lock (flock) makes one process the owner
    DIR/superblock        whose directory this is (kvengine.tiers.format)
    DIR/tenants.json      secrets and epochs (kvengine.tenants)
    DIR/segments/N.seg    header, footer, slots

A write counts only with its full byte count, in durable mode only once its table has been synced. A
segment that is full gets its footer; opening reads footers, and scans what none covers. When the
directory would outgrow its size, the oldest segment is used again, whole; what the policy wants of
it has been written to a newer one before. A sync that fails takes its segment with it. Any doubt on
reading is reported as a failure, and the block is given up here and above.
"""

from __future__ import annotations

import errno
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s
from kvengine.errors import (
    ConfigError,
    DirectoryInUse,
    FrameError,
    FrameExpired,
    UnknownKey,
)
from kvengine.index import KeyTable, Words, grown
from kvengine.keys import KEY_BYTES
from kvengine.metrics import Metrics
from kvengine.seal import HEADER_BYTES, Sealer, around
from kvengine.tiers import Dropped, Held, Report, Span, verify
from kvengine.tiers.breaker import Breaker
from kvengine.tiers.files import Files, OSFiles
from kvengine.tiers.format import (
    AES_256_GCM,
    BLOCK,
    DROPPED,
    PAGE_BYTES,
    PLAIN,
    Geometry,
    SlotHeader,
    pages,
)
from kvengine.tiers.segments import NOBODY, Segment, Segments
from kvengine.workers import Workers

SEGMENT_BYTES = 256 << 20
CLOSE_S = 30.0
FULL_S = 60.0  # how long a full disk is left alone before the next try to grow
KEEP_SHARE = 4
SLOW_S = 10.0  # a disk that takes longer for one frame is as good as away
# What says nothing of the block: the process is short of something.
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})

# What says nothing of the disk.
HARMLESS = PASSING | {errno.ENOENT, errno.ENOSPC, errno.EDQUOT}

Bools = NDArray[np.bool_]
# Given uint8[n, 32] keys of a segment that is to go, in order of writing, and which of them were
# read since: which to write once more.
Keep = Callable[[NDArray[np.uint8], Bools], Bools]


def second_chance(keys: NDArray[np.uint8], touched: Bools) -> Bools:
    """Keep what was read since it was written, at most a quarter of all, the newest first."""
    wanted = np.flatnonzero(touched)[-max(1, len(keys) // KEEP_SHARE) :]
    keep = np.zeros(len(keys), dtype=np.bool_)
    keep[wanted] = True
    return keep


class Place(NamedTuple):
    """Where a block lies, or is being written."""

    segment: Segment
    slot: int
    sequence: int


Written = tuple[Place, SlotHeader]


class Places(KeyTable):
    """Where each block lies: columns of segment number << 32 | slot, and sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.at = np.zeros(self.capacity, dtype=np.int64)
        self.sequence = np.zeros(self.capacity, dtype=np.int64)

    def _resize_columns(self, capacity: int) -> None:
        self.at = grown(self.at, capacity, 0)
        self.sequence = grown(self.sequence, capacity, 0)


class DiskTier:
    """Frames in a directory of this machine. One process at a time; its threads may share it.

    `files` are the file calls, `workers` the threads (of `threads` many where none are given),
    `keep` decides what outlives its segment; with `seal` blocks lie there encrypted. Raises
    DirectoryInUse where another process (or engine) holds the directory, ConfigError where it holds
    something else, another version, or blocks that are not sealed where these are to be.
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
        files: Files | None = None,
        workers: Workers | None = None,
        keep: Keep = second_chance,
        seal: Sealer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._segment_bytes = min(segment_bytes, max(PAGE_BYTES, size_bytes // 4))
        self._metrics = metrics
        self._dropped = dropped
        self._durable = durable
        self._keep = keep
        self._clock = clock
        self._breaker = Breaker()
        self._trying = False
        self._lock = threading.Lock()
        self._making = threading.Lock()  # held while files are made, by those who need one
        self._segments: dict[int, Segment] = {}
        self._open: dict[int, Segment] = {}
        self._places = Places()
        self._found: dict[tuple[bytes, int], list[NDArray[np.uint8]]] = {}
        self._nbytes = 0
        self._allocated = 0
        self._full_bytes = 0
        self._full_until = -float("inf")
        self._next = 1
        self._drawn = 0
        self._closed = False
        self._files = files or OSFiles()
        self._sealer = seal
        self._more_bytes = HEADER_BYTES if seal else 0  # that a block takes on disk
        cipher = AES_256_GCM if seal else PLAIN
        self._folder = Segments(self._files, path, self._count, cipher)
        self.incarnation = self._own()
        try:
            self._recover()
        except BaseException:
            self.detach()
            raise
        self._workers = workers or Workers(threads, "kvengine-disk", self._failed)

    def _own(self) -> int:
        self._owner = -1
        try:
            self._files.make_folder(self._path)
            self._owner = self._files.lock(self._path / "lock")
            self._files.settle(self._path)
            return self._folder.own()
        except BlockingIOError as error:
            raise DirectoryInUse(
                f"{self._path} is held by another process or engine: close that one, or give this "
                "one a directory of its own; several processes (ranks of one model, say) share one "
                "through a daemon: start 'kvengine serve', and open unix:///PATH/OF/ITS/SOCKET"
            ) from error
        except OSError as error:
            self.detach()
            raise ConfigError(
                f"{self._path} cannot be used ({error.strerror or error}): give a directory that "
                "this user may write, on a disk with room"
            ) from error
        except ConfigError:
            self.detach()
            raise

    @property
    def away(self) -> bool:
        """Whether the disk fails, and is left alone for now. A trial is begun where one is due."""
        return not self._passes()

    @property
    def nbytes(self) -> int:
        """Bytes of frames held."""
        return self._nbytes

    @property
    def count(self) -> int:
        """Number of frames held."""
        return self._places.count

    def scan(self) -> Iterator[Held]:
        """Yield the frames found at opening, once, a table for each namespace."""
        found, self._found = self._found, {}
        for (identity, frame_bytes), tables in found.items():
            if frame_bytes > self._more_bytes:
                yield Held(np.concatenate(tables), identity, frame_bytes - self._more_bytes)

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        """Return the size of each key's slot, 0 for none. Known at once."""
        with self._lock:
            ids = self._places.find(_words(keys)).tolist()
            held = [None if id < 0 else self._place(id).segment for id in ids]
            more = PAGE_BYTES + self._more_bytes
            return [0 if s is None else s.geometry.stride - more for s in held]

    def read(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue reads, one piece of work a frame; each is reported when its bytes are verified."""
        if not self._passes():
            for index in range(len(spans)):
                report(index, False)
            return
        places = self._enter(spans)
        for index, (span, place) in enumerate(zip(spans, places, strict=True)):
            if place is None:
                report(index, False)
            elif not self._workers.submit(
                partial(self._read, index, span, place, deadline, report)
            ):
                self._leave(place.segment)
                report(index, False)
        unknown = [s.key for s, p in zip(spans, places, strict=True) if p is None]
        if unknown:
            self._dropped(unknown)

    def write(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue writes, one piece of work a frame; in durable mode one sync for the table."""
        left = [len(spans)]
        unsynced: list[tuple[int, Written]] = []

        def over(index: int, found: Written | None) -> None:
            if found is not None and not self._durable:
                report(index, self._settle([found])[0])
                self._written([found[0].segment])
            with self._lock:
                left[0] -= 1
                last = left[0] == 0
                if found is not None and self._durable:
                    unsynced.append((index, found))
            if last and unsynced:
                self._sync(unsynced, report)

        for index, span in enumerate(spans):
            if not self._workers.submit(partial(self._write, index, span, deadline, over, report)):
                report(index, False)
                over(index, None)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget keys. Their space comes back with their segment."""
        for key in keys:
            place = self._forget(key)
            if place is not None and not self._workers.submit(partial(self._blank, place)):
                self._leave(place.segment)

    def close(self) -> None:
        """Finish what is queued, write footers, sync, close the files, let go of the lock."""
        if self._closed:
            return
        self._closed = True
        if not self._workers.close(CLOSE_S):
            return  # a thread hangs in the disk: a closed descriptor could become another file's
        for segment in list(self._segments.values()):
            if segment.table is not None and segment.used:
                self._seal(segment)
            elif segment.amiss:
                self._folder.unseal(segment)
        self._let_go()

    def detach(self) -> None:
        """After a fork, in the child: close descriptors. The parent keeps the lock."""
        self._closed = True
        self._lock = threading.Lock()
        self._folder.detach()
        self._let_go()

    def _let_go(self) -> None:
        self._folder.close()
        self._segments, self._open, self._places = {}, {}, Places()
        if self._owner >= 0:
            self._files.close(self._owner)
            self._owner = -1

    def _failed(self, error: Exception) -> None:
        self._count("tier_failures")
        if isinstance(error, OSError) and error.errno not in HARMLESS:
            self._went_wrong()

    def _went_wrong(self) -> None:
        with self._lock:
            self._breaker.failed(self._clock())

    def _went_well(self, since: float) -> None:
        """Note a read or a write that was whole; one that took too long says that nothing is."""
        if self._clock() - since > SLOW_S:
            self._went_wrong()
        else:
            with self._lock:
                self._breaker.succeeded()

    def _passes(self) -> bool:
        """Whether requests reach the disk. Where a trial is due, begin it behind."""
        if self._breaker.closed:
            return True
        with self._lock:
            due = self._breaker.trial(self._clock()) and not self._trying
            self._trying |= due
        if due and not self._workers.submit(self._try):
            self._trying = False
        return self._breaker.closed

    def _try(self) -> None:
        since = self._clock()
        try:
            self._folder.touch()
            self._went_well(since)
        except OSError as error:
            self._failed(error)
        finally:
            self._trying = False

    def _count(self, what: str) -> None:
        self._metrics.add(what, 1, tier=self.name)

    def _draw(self) -> int:
        """Return a number that no writer of this directory has drawn before."""
        self._drawn += 1
        return self.incarnation << 32 | self._drawn

    # Reading

    def _enter(self, spans: Sequence[Span]) -> list[Place | None]:
        """Find blocks, and keep their segments from being used again until `_leave`."""
        with self._lock:
            ids = self._places.find(_words([span.key for span in spans]))
            places = [None if id < 0 else self._place(id) for id in ids.tolist()]
            for place in places:
                if place is not None:
                    place.segment.readers += 1
                    place.segment.touched[place.slot] = True
            return places

    def _place(self, id: int) -> Place:
        at = int(self._places.at[id])
        return Place(self._segments[at >> 32], at & 0xFFFFFFFF, int(self._places.sequence[id]))

    def _leave(self, segment: Segment) -> None:
        with self._lock:
            segment.readers -= 1

    def _read(self, index: int, span: Span, place: Place, deadline: float, report: Report) -> None:
        good, since = False, self._clock()
        try:
            if since < deadline and self._passes():
                good = self._read_frame(span, place)
            if good:
                self._went_well(since)
                self._metrics.add("op_seconds", self._clock() - since, op="read", tier=self.name)
        finally:
            self._leave(place.segment)
            report(index, good)

    def _read_frame(self, span: Span, place: Place) -> bool:
        if place.segment.gone:
            return False
        try:
            get = self._read_plain if self._sealer is None else self._read_sealed
            if get(span, place) == DROPPED:  # forgotten by a footer that is older
                self._give_up(span.key, place)
                return False
            verify(span)
            return True
        except FrameExpired:
            self._metrics.add("expired", 1, kind="block")
            self._give_up(span.key, place)
        except UnknownKey:
            self._count("unreadable_blocks")
            self._give_up(span.key, place)
        except FrameError:
            self._count("corrupt_blocks")
            self._give_up(span.key, place)
        except OSError as error:
            self._failed(error)
            if error.errno == errno.ENOENT:
                self._lose(place.segment)
            elif error.errno not in PASSING:
                self._give_up(span.key, place)
        return False

    def _read_plain(self, span: Span, place: Place) -> int:
        """Read what is asked for; returns BLOCK or DROPPED."""
        stop = span.nbytes if span.stop is None else min(span.stop, span.nbytes)
        target = span.frame[span.start : pages(stop)]
        if span.start:
            segment, slot, _ = place
            self._folder.read_on(segment, slot, target, span.start, stop - span.start)
            return BLOCK
        header = self._folder.read(*place, target, stop)
        if header.kind == BLOCK and (header.key != span.key or header.frame_bytes != span.nbytes):
            raise FrameError("a slot with another block")
        return header.kind

    def _read_sealed(self, span: Span, place: Place) -> int:
        """Read and open the segments that what is asked for takes; returns BLOCK or DROPPED."""
        assert self._sealer is not None
        segment, slot, _ = place
        stop = span.nbytes if span.stop is None else min(span.stop, span.nbytes)
        first, last = around(span.nbytes, span.start, stop)
        first, last = HEADER_BYTES + first, HEADER_BYTES + last
        with self._sealer.room(HEADER_BYTES + span.nbytes) as room:
            if span.start:
                self._folder.read_on(segment, slot, room[:PAGE_BYTES], 0, PAGE_BYTES)
                rest = room[first : pages(last)]
                self._folder.read_on(segment, slot, rest, first, last - first)
            else:
                header = self._folder.read(*place, room[: pages(last)], last)
                if header.kind == DROPPED:
                    return header.kind
                if header.frame_bytes != HEADER_BYTES + span.nbytes:
                    raise FrameError("a slot with another block")
            self._sealer.open(room, span.key, span.frame, span.nbytes, span.start, stop)
        return BLOCK

    def _check(self, header: SlotHeader, room: memoryview) -> None:
        """Verify what was read of a block, whatever form it has there. Raises FrameError."""
        if self._sealer is None:
            verify(Span(header.key, room, header.frame_bytes))
            return
        nbytes = header.frame_bytes - HEADER_BYTES
        if nbytes <= 0:
            raise FrameError("a slot with no sealed block")
        with self._sealer.room(nbytes) as plain:
            self._sealer.open(room, header.key, plain, nbytes)
            verify(Span(header.key, plain, nbytes))

    def _give_up(self, key: bytes, place: Place) -> None:
        """Forget a block that cannot be read, here and above: it is to be computed again."""
        given = self._forget(key, place)
        if given is not None and not self._workers.submit(partial(self._blank, given)):
            self._leave(given.segment)
        self._dropped([key])

    def _forget(self, key: bytes, only: Place | None = None) -> Place | None:
        """Let no read find a key. Returns its place, entered, where it was held (there)."""
        with self._lock:
            ids = self._places.find(_words([key]))
            if ids[0] < 0:
                return None
            place = self._place(int(ids[0]))
            if only is not None and place != only:
                return None
            self._erase(ids)
            place.segment.readers += 1
            return place

    def _erase(self, ids: Int32s) -> None:
        for at in self._places.at[ids].tolist():
            segment, slot = self._segments[at >> 32], at & 0xFFFFFFFF
            segment.ids[slot] = NOBODY
            if segment.table is not None:
                segment.table[slot]["sequence"] = 0
            self._nbytes -= segment.geometry.stride - PAGE_BYTES
        self._places.erase(ids)
        self._places.free(ids)

    def _blank(self, place: Place) -> None:
        try:
            with self._lock:
                gone = place.segment.gone
            if not gone:
                place.segment.amiss |= place.segment.table is None
                self._folder.blank(*place)
        except OSError as error:
            self._failed(error)
        finally:
            self._leave(place.segment)

    # Writing

    def _held(self, span: Span) -> Place | None:
        """Where a block is already, kept from eviction until `_written`.

        It is read, since what an earlier process has left may not be whole, and a report of True is
        a promise.
        """
        with self._lock:
            ids = self._places.find(_words([span.key]))
            if ids[0] < 0:
                return None
            place = self._place(int(ids[0]))
            place.segment.writing += 1
        if self._is_whole(place):
            return place
        self._give_up(span.key, place)
        self._written([place.segment])
        return None

    def _write(
        self,
        index: int,
        span: Span,
        deadline: float,
        over: Callable[[int, Written | None], None],
        report: Report,
    ) -> None:
        held, found, since = None, None, self._clock()
        try:
            if since < deadline and self._passes():
                held = self._held(span)
                if held is not None and self._durable and not held.segment.promised:
                    self._sync_segments([held.segment])
                found = None if held else self._write_frame(span)
            if found is not None:
                self._went_well(since)
                self._metrics.add("op_seconds", self._clock() - since, op="write", tier=self.name)
        finally:
            if found is None:
                report(index, held is not None and not (self._durable and held.segment.gone))
            over(index, found)
            if held is not None:
                self._written([held.segment])

    def _write_frame(self, span: Span) -> Written | None:
        """Write a frame to a slot of its own; `_settle` makes it visible."""
        try:
            place = self._take(PAGE_BYTES + pages(span.nbytes + self._more_bytes))
        except OSError as error:
            self._failed(error)
            return None
        if place is None:
            return None
        try:
            if self._sealer is None:
                return place, self._folder.write(*place, span.frame, span.nbytes)
            with self._sealer.sealed(span.frame, span.nbytes) as data:
                return place, self._folder.write(*place, data, HEADER_BYTES + span.nbytes)
        except (OSError, FrameError, ConfigError) as error:  # no frame, or no key to seal it with
            self._failed(error)
            self._written([place.segment])
            return None

    def _sync(self, unsynced: Sequence[tuple[int, Written]], report: Report) -> None:
        """Sync what a table was written to; only then do its blocks count."""
        written = [found for _, found in unsynced]
        self._sync_segments([place.segment for place, _ in written])
        for (index, _), good in zip(unsynced, self._settle(written), strict=True):
            report(index, good)
        self._written([place.segment for place, _ in written])

    def _sync_segments(self, written: Sequence[Segment]) -> None:
        for segment in {segment.number: segment for segment in written}.values():
            try:
                self._folder.promise(segment)
            except OSError as error:
                # The kernel may have thrown pages away and called them clean: no second try.
                self._failed(error)
                self._lose(segment)

    def _settle(self, written: Sequence[Written]) -> list[bool]:
        """Make written blocks visible, but those whose segment has gone meanwhile."""
        good = []
        with self._lock:
            for place, header in written:
                good.append(not place.segment.gone)
                if not place.segment.gone:
                    self._register(place, header)
        return good

    def _register(self, place: Place, header: SlotHeader, instead: Place | None = None) -> None:
        """Note where a block lies; `instead` of where it lay, if it still does."""
        segment, slot, sequence = place
        ids = self._places.find(_words([header.key]))
        if instead is not None:
            if ids[0] < 0 or self._place(int(ids[0])) != instead:
                return  # dropped meanwhile
            instead.segment.ids[instead.slot] = NOBODY
        elif ids[0] >= 0:
            return  # another was first, with bytes as good
        else:
            ids, _ = self._places.claim(_words([header.key]))
            self._nbytes += segment.geometry.stride - PAGE_BYTES
        self._places.at[ids] = segment.number << 32 | slot
        self._places.sequence[ids] = sequence
        segment.ids[slot] = ids[0]
        assert segment.table is not None  # a segment that is being written is not sealed
        entry = segment.table[slot]
        entry["key"] = np.frombuffer(header.key, dtype=np.uint8)
        entry["identity"] = np.frombuffer(header.identity, dtype=np.uint8)
        entry["frame_bytes"], entry["sequence"] = header.frame_bytes, sequence

    def _written(self, segments: Sequence[Segment]) -> None:
        """Count writes that are over; a segment that is full, and written in full, is sealed."""
        done = []
        with self._lock:
            for segment in segments:
                segment.writing -= 1
                whole = segment.full and not segment.writing and not segment.gone
                if whole and segment.table is not None:
                    segment.writing += 1
                    done.append(segment)
        for segment in done:
            self._workers.submit(partial(self._seal_full, segment))

    def _seal_full(self, segment: Segment) -> None:
        try:
            self._seal(segment)
        finally:
            with self._lock:
                segment.writing -= 1
                segment.table = None

    def _seal(self, segment: Segment) -> None:
        try:
            self._folder.seal(segment)
        except OSError as error:
            self._failed(error)
            self._lose(segment)

    def _lose(self, segment: Segment) -> None:
        """Give a whole segment up, with all its blocks: its file cannot be trusted, or is gone."""
        with self._lock:
            keys = self._empty(segment)
        self._remove(segment)
        if keys:
            self._dropped(keys)

    def _remove(self, segment: Segment) -> None:
        try:
            self._folder.remove(segment)
        except OSError as error:
            self._failed(error)

    # Room

    def _take(self, stride: int) -> Place | None:
        """Return a free slot, or None where the disk gives none."""
        with self._lock:
            place = self._next_slot(stride)
        if place is not None:
            return place
        with self._making:
            with self._lock:
                place = self._next_slot(stride)  # another has made one meanwhile
            if place is not None or not self._make(stride):
                return place
            with self._lock:
                return self._next_slot(stride)

    def _next_slot(self, stride: int) -> Place | None:
        segment = self._open.get(stride)
        if segment is None or segment.full:
            return None
        slot = segment.used
        segment.used += 1
        segment.writing += 1
        return Place(segment, slot, self._draw())

    def _make(self, stride: int) -> bool:
        """Open a segment for slots of this size: a new file, or the oldest one used again."""
        geometry = Geometry.fitting(stride, self._segment_bytes)
        victim = None
        while self._short(geometry.nbytes):
            with self._lock:
                victim = self._victim()
                keys = [] if victim is None else self._empty(victim)
            if victim is None:
                return False
            self._evicted(keys)
            with self._lock:
                if victim.geometry == geometry and not victim.readers:
                    break
            self._remove(victim)
            victim = None
        made = self._made(geometry, victim)
        with self._lock:
            self._segments[made.number] = made
            self._open[stride] = made
            self._allocated += geometry.nbytes
            next_to_go = self._victim()
            soon = self._short(geometry.nbytes)
        if soon and next_to_go is not None and next_to_go is not made:
            self._workers.submit(partial(self._rescue, next_to_go))
        return True

    def _made(self, geometry: Geometry, victim: Segment | None) -> Segment:
        with self._lock:
            generation = self._draw()
            number = self._next
            self._next += victim is None
        try:
            if victim is None:
                return self._folder.create(number, generation, geometry, durable=self._durable)
            return self._folder.renew(victim, generation)
        except OSError as error:
            if victim is not None:
                self._remove(victim)
            elif error.errno in (errno.ENOSPC, errno.EDQUOT):
                # What there is now is used again, until it is time to see if the disk has grown.
                self._full_bytes = self._allocated
                self._full_until = self._clock() + FULL_S
            raise

    def _short(self, nbytes: int) -> bool:
        """Whether a segment of so many bytes more would be too much for the disk."""
        full = self._clock() < self._full_until and nbytes <= self._full_bytes
        return self._allocated + nbytes > (self._full_bytes if full else self._size_bytes)

    def _victim(self) -> Segment | None:
        """Return the oldest segment that nobody writes; one with room only where there is none."""

        def order(segment: Segment) -> tuple[bool, int]:
            filling = self._open.get(segment.geometry.stride) is segment and not segment.full
            return filling, segment.generation

        return min((s for s in self._segments.values() if not s.writing), key=order, default=None)

    def _empty(self, segment: Segment) -> list[bytes]:
        """Forget a segment and its blocks. Returns their keys."""
        if segment.gone:
            return []
        ids = segment.ids[segment.ids != NOBODY]
        keys = [key.tobytes() for key in self._places.keys(ids)]
        self._erase(ids)
        segment.gone = True
        del self._segments[segment.number]
        self._allocated -= segment.geometry.nbytes
        if self._open.get(segment.geometry.stride) is segment:
            del self._open[segment.geometry.stride]
        return keys

    def _evicted(self, keys: Sequence[bytes]) -> None:
        if keys:
            self._metrics.add("evicted_blocks", len(keys), reason="disk size")
            self._dropped(keys)

    def _rescue(self, segment: Segment) -> None:
        """Write once more, to the open segment, what is wanted of the one that goes next."""
        with self._lock:
            slots = np.flatnonzero(segment.ids != NOBODY)
            if segment.gone or not len(slots):
                return
            ids = segment.ids[slots]
            keep = self._keep(self._places.keys(ids), segment.touched[slots])
            wanted = [self._place(id) for id in ids[keep].tolist()]
            segment.readers += len(wanted)
            segment.touched[:] = False
        room = memoryview(mmap.mmap(-1, segment.geometry.stride - PAGE_BYTES))
        moved = []
        for place in wanted:
            found = self._copy(place, room)
            if found is not None:
                moved.append((place, found))
        if self._durable:
            self._sync_segments([place.segment for _, (place, _) in moved])
        with self._lock:
            segment.readers -= len(wanted)
            for old, (place, header) in moved:
                if not place.segment.gone:
                    self._register(place, header, instead=old)
        self._written([place.segment for _, (place, _) in moved])

    def _copy(self, place: Place, room: memoryview) -> Written | None:
        """Write one block again, where its size has an open segment with room."""
        with self._lock:
            target = self._next_slot(place.segment.geometry.stride)
        if target is None:
            return None
        try:
            header = self._folder.read(*place, room)
            self._check(header, room)
            return target, self._folder.write(*target, room, header.frame_bytes)
        except (OSError, FrameError) as error:
            if not isinstance(error, FrameExpired):
                self._failed(error)
            self._written([target.segment])
            return None

    # Found again

    def _recover(self) -> None:
        """Take in the segments that are there, the oldest first, and keep to the size."""
        loaded = []
        for name in self._folder.names():
            self._next = max(self._next, int(name[:8]) + 1)
            try:
                loaded.append(self._folder.load(name))
            except OSError as error:
                self._failed(error)  # its file takes room until it is the oldest, and goes
                path, geometry = self._path / "segments" / name, Geometry(self._segment_bytes, 1)
                loaded.append(Segment(int(name[:8]), path, 0, geometry))
                loaded[-1].used = 1
        loaded.sort(key=lambda segment: segment.generation)
        self._allocated = sum(segment.geometry.nbytes for segment in loaded)
        for segment in loaded:
            if self._allocated > self._size_bytes:
                self._allocated -= segment.geometry.nbytes
                self._remove(segment)
                continue
            self._segments[segment.number] = segment
            self._adopt(segment)
            if segment.full:
                segment.table = None
            else:
                self._open[segment.geometry.stride] = segment

    def _adopt(self, segment: Segment) -> None:
        """Take in the blocks of a segment; of two copies of a block the later whole one counts."""
        assert segment.table is not None
        frames_max = segment.geometry.stride - PAGE_BYTES
        held = (segment.table["sequence"] > 0) & (segment.table["frame_bytes"] <= frames_max)
        slots = np.flatnonzero(held)
        if not len(slots):
            return
        rows = segment.table[slots]
        keys = np.ascontiguousarray(rows["key"])
        for names, chosen in _namespaces(rows):
            self._found.setdefault(names, []).append(keys[chosen])
        ids, fresh = self._places.claim(keys.view("<u8").reshape(-1, KEY_BYTES // 8))
        new = ids[fresh]
        self._places.at[new] = segment.number << 32 | slots[fresh]
        self._places.sequence[new] = rows["sequence"][fresh]
        segment.ids[slots[fresh]] = new
        self._nbytes += frames_max * len(new)
        for row in np.flatnonzero(~fresh).tolist():
            id, place = int(ids[row]), Place(segment, int(slots[row]), int(rows["sequence"][row]))
            old = self._place(id)
            # The later one may have been under way when the power went.
            later = place if place.sequence > old.sequence else old
            if (later is place) is self._is_whole(later):
                old.segment.ids[old.slot] = NOBODY
                self._places.at[id] = segment.number << 32 | place.slot
                self._places.sequence[id] = place.sequence
                segment.ids[place.slot] = id

    def _is_whole(self, place: Place) -> bool:
        room = memoryview(mmap.mmap(-1, place.segment.geometry.stride - PAGE_BYTES))
        try:
            header = self._folder.read(*place, room)
            self._check(header, room)
            return header.kind != DROPPED
        except (OSError, FrameError):
            return False


def _namespaces(rows: NDArray[np.void]) -> Iterator[tuple[tuple[bytes, int], Bools]]:
    """Yield (identity, frame bytes) and which rows have them; a segment mostly has one."""
    left = np.ones(len(rows), dtype=np.bool_)
    while left.any():
        first = rows[int(left.argmax())]
        same = (rows["identity"] == first["identity"]).all(axis=1)
        same &= rows["frame_bytes"] == first["frame_bytes"]
        yield (first["identity"].tobytes(), int(first["frame_bytes"])), same
        left &= ~same


def _words(keys: Sequence[bytes]) -> Words:
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, KEY_BYTES // 8)
