"""Read all of a tier: what is damaged, and giving it up.

A disk tier's directory, while no engine has it; or what a remote store holds, while engines may use
it. The bytes are verified as a read does it: slot header, frame header, every segment of the
payload.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kvengine.errors import (
    ConfigError,
    DirectoryInUse,
    FrameError,
    FrameExpired,
    UnknownKey,
)
from kvengine.seal import HEADER_BYTES, Sealer, structure
from kvengine.tiers import Span, verify
from kvengine.tiers.files import Files, OSFiles
from kvengine.tiers.format import BLOCK, PAGE_BYTES, PLAIN
from kvengine.tiers.remote import ABSENT, RATE_MIN, Client
from kvengine.tiers.segments import Segment, Segments

NAMES_MAX = 100
NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)
BATCH_BYTES = 8 << 20
VALUE_BYTES_MAX = 1 << 30


@dataclass
class Report:
    """How it went. `damaged_pages` are superblocks, segment headers, footers, slots of an unsealed
    segment; `unreadable` what the disk or the store would not give; `others` what stands in a store
    under names that are none of ours; `unopened` blocks are sealed with keys that are not held, and
    only what can be seen of them was checked."""

    segments: int = 0
    others: int = 0
    blocks: int = 0
    unopened: int = 0
    nbytes: int = 0
    damaged_blocks: int = 0
    damaged_pages: int = 0
    unreadable: int = 0
    mended: bool = False
    seconds: float = 0.0
    damaged: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether nothing was damaged."""
        return not (self.damaged_blocks or self.damaged_pages or self.unreadable)

    def shown(self) -> dict[str, object]:
        """Give all by name, fit to be printed."""
        return {
            "segments": self.segments,
            "others": self.others,
            "blocks": self.blocks,
            "unopened": self.unopened,
            "bytes": self.nbytes,
            "damaged blocks": self.damaged_blocks,
            "damaged pages": self.damaged_pages,
            "unreadable": self.unreadable,
            "mended": self.mended and not self.whole,
            "seconds": round(self.seconds, 3),
            "damaged": self.damaged,
        }


def scrub(
    folder: Path,
    *,
    mend: bool,
    rate_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    files: Files | None = None,
    seal: Sealer | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Report:
    """Read every block, at most `rate_bytes` a second. `mend`: give damaged ones up.

    Sealed blocks are opened by `seal`, where it has their keys.

    `progress` is told bytes done and bytes in all. Raises DirectoryInUse where an engine has the
    directory, ConfigError where it is none of kvengine's.
    """
    files = files or OSFiles()
    found = Report(mended=mend)

    def count(what: str) -> None:
        found.damaged_pages += what == "corrupt_blocks"
        found.unreadable += what == "tier_failures"

    segments = Segments(files, folder, count)
    if not folder.is_dir() and isinstance(files, OSFiles):
        raise ConfigError(f"{folder} is not a directory")
    try:
        owner = files.lock(folder / "lock")
    except BlockingIOError as error:
        raise DirectoryInUse(f"{folder} is held by an engine: close that one first") from error
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror})") from error
    try:
        segments.look()
        if mend:
            pages = found.damaged_pages
            segments.own()  # of the cipher that was found; writes the superblock's other page anew
            found.damaged_pages = pages
        _walk(segments, found, seal, rate_bytes, progress, clock, sleep)
    finally:
        segments.close()
        files.close(owner)
    return found


def scrub_store(
    client: Client,
    prefix: str,
    *,
    mend: bool,
    timeout_s: float,
    sealed: bool = False,
    seal: Sealer | None = None,
    rate_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Report:
    """Read every block of a remote store, as `scrub` does. `mend`: delete damaged ones.

    sealed: what is plain there is damaged, and the reverse.

    The client stays the caller's to close. Raises ConfigError where the store does not answer.
    """
    found, start = Report(mended=mend), clock()
    look = partial(_look, found, seal, sealed)
    try:
        total = sum(max(0, size) for name, size in client.names(prefix) if _key_of(name, prefix))
        batch: list[tuple[str, int]] = []
        for name, size in client.names(prefix):
            if not _key_of(name, prefix):
                found.others += 1
                continue
            if batch and sum(size for _, size in batch) + size > min(
                client.batch_bytes, BATCH_BYTES
            ):
                _check_batch(client, prefix, batch, found, timeout_s, look)
                batch = []
                progress(found.nbytes, max(total, found.nbytes))
                if rate_bytes is not None:
                    sleep(max(0.0, start + found.nbytes / rate_bytes - clock()))
            batch.append((name, size))
        _check_batch(client, prefix, batch, found, timeout_s, look)
        progress(found.nbytes, found.nbytes)
    except OSError as error:
        raise ConfigError(f"the store does not answer ({error}): see that it runs") from error
    found.seconds = clock() - start
    return found


def _look(
    found: Report, seal: Sealer | None, sealed: bool, key: bytes, room: memoryview, nbytes: int
) -> None:
    """Verify one block and count it. Raises FrameError."""
    try:
        if not sealed:
            verify(Span(key, room, nbytes))
        elif seal is None:
            structure(room[:nbytes], key, nbytes - HEADER_BYTES)
            found.unopened += 1
        else:
            plain = memoryview(bytearray(max(1, nbytes - HEADER_BYTES)))
            seal.open(room, key, plain, len(plain))
            verify(Span(key, plain, len(plain)))
    except UnknownKey:
        found.unopened += 1
    except FrameExpired:
        pass  # whole; given up when it is asked for, or its segment is used again
    found.blocks += 1


def _key_of(name: str, prefix: str) -> bytes:
    """Return the key that a name stands for, nothing where it is none of ours."""
    match = NAME.fullmatch(name[len(prefix) :])
    return bytes.fromhex(match[0]) if match else b""


def _check_batch(
    client: Client,
    prefix: str,
    batch: list[tuple[str, int]],
    found: Report,
    timeout_s: float,
    look: Callable[[bytes, memoryview, int], None],
) -> None:
    """Read some frames, and delete those that are damaged if that is wanted."""
    fine = range(1, VALUE_BYTES_MAX + 1)
    bad = [(name, f"a value of {size} bytes") for name, size in batch if size not in fine]
    batch = [(name, size) for name, size in batch if size in fine]
    rooms = [memoryview(bytearray(size)) for _, size in batch]
    left = set(range(len(batch)))

    def arrived(index: int, size: int) -> None:
        name, expected = batch[index]
        left.discard(index)
        if size == ABSENT:
            return  # deleted, or expired, meanwhile
        found.nbytes += expected
        try:
            if size != expected:
                raise FrameError("another value than a moment ago")
            look(_key_of(name, prefix), rooms[index], expected)
        except FrameError as error:
            bad.append((name, str(error)))

    nbytes = sum(size for _, size in batch)
    if batch:
        until = time.monotonic() + timeout_s + nbytes / RATE_MIN
        client.get([name for name, _ in batch], rooms, until, arrived)
    for index in sorted(left):
        found.unreadable += 1
        _note(found, f"{batch[index][0]}: no answer")
    for name, said in bad:
        found.damaged_blocks += 1
        _note(found, f"{name}: {said}")
    if found.mended and bad:
        client.delete([name for name, _ in bad], time.monotonic() + timeout_s)


def _walk(
    segments: Segments,
    found: Report,
    seal: Sealer | None,
    rate_bytes: int | None,
    progress: Callable[[int, int], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    start, loaded = clock(), []
    look = partial(_look, found, seal, segments.cipher != PLAIN)
    for name in segments.names():
        pages = found.damaged_pages
        try:
            segment = segments.load(name)
        except OSError as error:
            found.unreadable += 1
            _note(found, f"{name}: {error.strerror}")
            continue
        loaded.append((segment, found.damaged_pages > pages))
        if found.damaged_pages > pages:
            _note(found, f"{name}: header, footer or a slot")
    total = sum(len(_slots(segment)) * segment.geometry.stride for segment, _ in loaded)
    for segment, amiss in loaded:
        found.segments += 1
        for slot in _slots(segment):
            if not _check(segments, segment, slot, found, look):
                amiss = True
            progress(found.nbytes, total)
            if rate_bytes is not None:
                sleep(max(0.0, start + found.nbytes / rate_bytes - clock()))
        if found.mended and amiss:
            try:
                segments.mend(segment) if segment.generation else segments.remove(segment)
            except OSError as error:
                found.unreadable += 1
                _note(found, f"{segment.path.name}: not mended: {error.strerror}")
    found.seconds = clock() - start


def _slots(segment: Segment) -> list[int]:
    assert segment.table is not None
    slots: list[int] = np.flatnonzero(segment.table["sequence"] > 0).tolist()
    return slots


def _check(
    segments: Segments,
    segment: Segment,
    slot: int,
    found: Report,
    look: Callable[[bytes, memoryview, int], None],
) -> bool:
    """Read one block; where it is damaged, count it, and give it up if that is wanted."""
    assert segment.table is not None
    entry = segment.table[slot]
    sequence, key = int(entry["sequence"]), entry["key"].tobytes()
    room = memoryview(mmap.mmap(-1, segment.geometry.stride - PAGE_BYTES))
    found.nbytes += segment.geometry.stride
    try:
        header = segments.read(segment, slot, sequence, room)
        if header.kind == BLOCK:
            look(key, room, header.frame_bytes)
        return True
    except (FrameError, OSError) as error:
        found.damaged_blocks += 1
        _note(found, f"{segment.path.name} slot {slot}: {error}")
    if found.mended:
        entry["sequence"] = 0
        try:
            segments.blank(segment, slot, sequence)
        except OSError:
            found.unreadable += 1
    return False


def _note(found: Report, text: str) -> None:
    if len(found.damaged) < NAMES_MAX:
        found.damaged.append(text)
