"""Everything slower than memory: whole frames in and out of arena slots, a table at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvengine import frame
from kvengine.errors import FrameError, FrameExpired

# How long a table of reads or writes may wait for its turn, where the caller has no deadline.
DEADLINE_S = 60.0

# Called once for each span, from the tier's own thread: its index in the table, and whether its
# bytes are where they should be. Until then the span's slot is the job's.
Report = Callable[[int, bool], None]
# Called with keys that a tier has given up by itself (evicted, damaged), from any thread.
Dropped = Callable[[Sequence[bytes]], None]


@dataclass(frozen=True, slots=True)
class Span:
    """One block to move. `frame` is arena memory: whole pages, its frame or frames at their start.

    A read may ask for some bytes of it, from `start` to `stop` (None: the end), both whole pages.
    The first ones have the header; the others are asked for when that is there. A tier may read
    more than it was asked for. Blocks of several frames are read whole.
    """

    key: bytes
    frame: memoryview
    nbytes: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A table of frames that a tier holds, found when it was opened: one namespace, one size.

    keys: uint8[n, 32].
    """

    keys: NDArray[np.uint8]
    identity: bytes
    frame_bytes: int


def verify(span: Span) -> None:
    """Verify what was read for a span, header and payload.

    Raises FrameError; FrameExpired for what is whole, but has outlived its time to live.

    Each tier calls this in the thread that has read the bytes, before it reports them good.
    """
    start, stop = span.start, span.nbytes if span.stop is None else span.stop
    for payload, header in frame.frames(span.frame[: span.nbytes]):
        if header.key != span.key:
            raise FrameError("a frame of another block")
        if header.expires != frame.NEVER and time.time() >= header.expires:
            raise FrameExpired("its time to live is over")
        at = span.nbytes - len(payload) if header.nbytes == span.nbytes else 0
        first, last = (start - at, stop - at) if at else (0, len(payload))
        if bad := frame.verify_payload(header, payload, first, last):
            raise FrameError(f"the bytes of segments {bad} have changed")


class Tier(Protocol):
    """Keep frames where memory does not reach.

    A failure is a report of False, never an exception: the tier counts it. A read is reported True
    only where the whole frame has been verified (`verify`); it is verified again where it is loaded
    from memory.
    """

    @property
    def name(self) -> str:
        """A word for metrics: "disk" …"""
        ...

    @property
    def remote(self) -> bool:
        """Whether others write to it as well: what it holds is asked by `find`, not scanned."""
        ...

    @property
    def away(self) -> bool:
        """Whether it fails and is left alone for now: what it holds is no hit meanwhile."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of frames held; 0 where that is not known."""
        ...

    def scan(self) -> Iterator[Held]:
        """Yield what was found when the tier was opened, in tables."""
        ...

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        """Return the size of each key's frame, 0 for none, -1 where no answer came in time."""
        ...

    def read(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Fill slots with frames. Spans not begun by the deadline are reported False."""
        ...

    def write(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Keep frames; visible here only once written in full."""
        ...

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget keys; unknown ones are no error."""
        ...

    def close(self) -> None:
        """Finish what is under way, give back files and threads. Idempotent."""
        ...

    def detach(self) -> None:
        """After a fork, in the child: let go of descriptors and locks, touch nothing."""
        ...
