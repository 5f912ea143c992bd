"""A store that others write to as well: frames under their keys' names, behind a breaker.

    names     prefix + the block key in hex; values are frames, the same bytes as everywhere
    reading   a batch at a time; each frame is verified whole before it is called good
    failing   a report of False and a counter; after failures in a row nothing is sent, and a trial
              on a thread of the tier's own finds out when the store is back

What the store gives back is hostile until it is verified: a value of another size, of another
block, or with a changed byte is a counted miss and is deleted there. How one store is talked to is
a `Client`'s business: `valkey.py`, `objects.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

from kvengine.errors import ConfigError, FrameError, FrameExpired, UnknownKey
from kvengine.metrics import Metrics
from kvengine.seal import HEADER_BYTES, Sealer
from kvengine.tiers import Dropped, Held, Report, Span, verify
from kvengine.tiers.breaker import Breaker
from kvengine.workers import Workers

QUEUE_BYTES = 256 << 20
SEALED_BYTES = 16 << 20  # a batch of sealed blocks: one is sealed while another is sent
# A batch may take its timeout, and the time of its bytes at this rate: a store that drips is away.
RATE_MIN = 16 << 20
CLOSE_S = 30.0
DOOMED_MAX, DELETE_MAX = 1 << 16, 1 << 10
ABSENT, FOREIGN = 0, -2


class Client(Protocol):
    """Talk to one store. Any thread may call any verb; OSError says that the store is away.

    A verb that has a `report` calls it once for each name that was answered, in any order; names
    without a report were not answered. Nothing touches a buffer once the verb is over.
    """

    name: str
    batch_bytes: int  # how much one call of `get` or `put` is given at most, but for one value

    def get(
        self,
        names: Sequence[str],
        targets: Sequence[memoryview],
        until: float,
        report: Callable[[int, int], None],
    ) -> None:
        """Fill targets with values; report each size, ABSENT, or FOREIGN for what does not fit."""
        ...

    def put(
        self,
        names: Sequence[str],
        values: Sequence[memoryview],
        until: float,
        report: Callable[[int, bool], None],
    ) -> None:
        """Store values; report which the store has taken."""
        ...

    def sizes(self, names: Sequence[str], until: float) -> list[int]:
        """Return the size of each value, 0 for none, -1 where no answer came. Never connects.

        Raises OSError where there was no answer at all.
        """
        ...

    def delete(self, names: Sequence[str], until: float) -> None:
        """Delete values; unknown names are no error."""
        ...

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield the names that begin so and the size of each value, -1 where it is none of ours.

        What comes and goes meanwhile may be missed, or named twice. Raises OSError.
        """
        ...

    def ping(self, until: float) -> None:
        """Make sure of a connection for `sizes`, and that the store answers."""
        ...

    def close(self) -> None:
        """Give connections back. Idempotent."""
        ...

    def detach(self) -> None:
        """After a fork, in the child: close descriptors, say nothing to the store."""
        ...


class RemoteTier:
    """Frames in a remote store. `lost` is called with keys that turned out not to be there.

    `timeout_s`: how long the store may be silent. `clock` gives seconds. With `seal` blocks lie
    there encrypted.
    """

    remote = True
    nbytes = 0  # others write to it as well

    def __init__(
        self,
        client: Client,
        metrics: Metrics,
        lost: Dropped,
        *,
        prefix: str,
        threads: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        queue_bytes: int = QUEUE_BYTES,
        seal: Sealer | None = None,
    ) -> None:
        self.name = client.name
        self._client = client
        self._metrics = metrics
        self._lost = lost
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._clock = clock
        self._sealer = seal
        self._more_bytes = HEADER_BYTES if seal else 0  # that a block takes in the store
        self._batch_bytes = min(client.batch_bytes, SEALED_BYTES) if seal else client.batch_bytes
        self._queue_bytes = queue_bytes
        self._lock = threading.Lock()
        self._deleted = threading.Condition(self._lock)
        self._breaker = Breaker()
        self._full = Breaker()  # of writes alone: a store that takes no more is still read
        self._queued = 0
        # Names to delete, and those that are being deleted: no longer here for anyone who asks.
        self._doomed: dict[str, None] = {}
        self._deleting: frozenset[str] = frozenset()
        self._mending = False
        self._closed = False
        self._workers = Workers(threads, f"kvengine-{self.name}", self._failed)

    @property
    def away(self) -> bool:
        """Whether the store fails, and is left alone for now."""
        return not self._breaker.closed

    def scan(self) -> Iterator[Held]:
        """Yield nothing: what is there is asked by `find`."""
        return iter(())

    def find(self, keys: Sequence[bytes], deadline: float) -> list[int]:
        """Return the size of each key's frame, 0 for none, -1 where no answer came in time.

        Asks over a connection that is there already: who calls never waits for one to be made.
        """
        if not keys or not self._passes():
            return [-1] * len(keys)
        names = [self._name_of(key) for key in keys]
        gone = self._gone(names)
        try:
            with self._timed("find"):
                sizes = self._client.sizes(names, deadline)
        except OSError as error:
            self._failed(error)
            self._mend()
            return [-1] * len(keys)
        self._went_well()
        gone |= self._gone(names)
        if self._sealer is not None:  # what is too small to be sealed is no block of any size
            sizes = [size - self._more_bytes if size > self._more_bytes else size for size in sizes]
        return [0 if at in gone else size for at, size in enumerate(sizes)] if gone else sizes

    def read(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue reads, in batches as the client likes them."""
        self._queue(self._read, spans, deadline, report)

    def write(self, spans: Sequence[Span], deadline: float, report: Report) -> None:
        """Queue writes, in batches as the client likes them."""
        self._queue(self._write, spans, deadline, report)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget frames at once, and delete them behind: later, where the store is away now."""
        with self._lock:
            for key in keys:
                self._doomed[self._name_of(key)] = None
            while len(self._doomed) > DOOMED_MAX:
                del self._doomed[next(iter(self._doomed))]
        if keys:
            self._workers.submit(self._delete)

    def close(self) -> None:
        """Finish what is queued, close the connections."""
        if self._closed:
            return
        self._closed = True
        self._workers.close(CLOSE_S)
        self._client.close()

    def detach(self) -> None:
        """After a fork, in the child: let go of connections."""
        self._closed = True
        self._lock = threading.Lock()
        self._client.detach()

    # Inside

    def _name_of(self, key: bytes) -> str:
        return self._prefix + key.hex()

    def _failed(self, error: Exception) -> None:
        self._metrics.add("tier_failures", 1, tier=self.name)
        if isinstance(error, OSError):
            with self._lock:
                self._breaker.failed(self._clock())

    def _gone(self, names: Sequence[str]) -> set[int]:
        """Return the indices of names that are to be deleted, or are being deleted."""
        with self._lock:
            doomed = self._doomed.keys() | self._deleting
        return {at for at, name in enumerate(names) if name in doomed} if doomed else set()

    def _went_well(self) -> None:
        with self._lock:
            self._breaker.succeeded()

    def _passes(self) -> bool:
        """Whether requests are sent. Where a trial is due, begin it behind."""
        with self._lock:
            closed, due = self._breaker.closed, self._breaker.trial(self._clock())
        if due:
            self._mend()
        return closed

    def _mend(self) -> None:
        """Have a thread of ours connect, and say whether the store is back."""
        with self._lock:
            mending, self._mending = self._mending, True
        if not mending and not self._workers.submit(self._try):
            self._mending = False

    def _try(self) -> None:
        try:
            self._client.ping(self._clock() + self._timeout_s)
            self._went_well()
            self._delete()
        except (OSError, ConfigError) as error:
            self._failed(error)
        finally:
            self._mending = False

    def _queue(
        self,
        work: Callable[[Sequence[Span], float, Report], None],
        spans: Sequence[Span],
        deadline: float,
        report: Report,
    ) -> None:
        """Cut a table into batches and queue them; refuse what is more than the queue may hold."""
        for first, batch in _batches(spans, self._batch_bytes):
            nbytes = sum(span.nbytes for span in batch)
            reported = partial(_shifted, report, first)
            if not self._passes() or not self._admit(nbytes):
                _refuse(batch, reported)
            elif not self._workers.submit(
                partial(self._run, work, batch, nbytes, deadline, reported)
            ):
                self._admit(-nbytes)
                _refuse(batch, reported)

    def _admit(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > 0 and self._queued and self._queued + nbytes > self._queue_bytes:
                return False
            self._queued += nbytes
            return True

    def _run(
        self,
        work: Callable[[Sequence[Span], float, Report], None],
        batch: Sequence[Span],
        nbytes: int,
        deadline: float,
        report: Report,
    ) -> None:
        """Run one batch; whatever it does not report is reported False."""
        self._admit(-nbytes)
        left = set(range(len(batch)))

        def once(index: int, good: bool) -> None:
            left.discard(index)
            report(index, good)

        try:
            now = self._clock()
            if now < deadline and self._passes():
                until = min(deadline, now + self._timeout_s + nbytes / RATE_MIN)
                work(batch, until, once)
        except OSError as error:
            self._failed(error)
        finally:
            for index in sorted(left):
                report(index, False)

    def _read(self, batch: Sequence[Span], until: float, report: Report) -> None:
        bad: list[bytes] = []

        def arrived(index: int, size: int) -> None:
            span, good = batch[index], False
            if size == span.nbytes + self._more_bytes:
                try:
                    self._open(span, targets[index])
                    verify(span)
                    good = True
                except FrameExpired:
                    self._metrics.add("expired", 1, kind="block")
                    bad.append(span.key)
                except UnknownKey:  # others may have it: it stays
                    self._metrics.add("unreadable_blocks", 1, tier=self.name)
                except FrameError:
                    size = FOREIGN
            if size not in (ABSENT, span.nbytes + self._more_bytes) and not good:
                self._metrics.add("corrupt_blocks", 1, tier=self.name)
                bad.append(span.key)
            if not good:
                self._lost([span.key])
            report(index, good)

        names = [self._name_of(span.key) for span in batch]
        with ExitStack() as lent:
            targets = [self._target(span, lent) for span in batch]
            wanted = [
                target[: span.nbytes + self._more_bytes]
                for span, target in zip(batch, targets, strict=True)
            ]
            with self._timed("read"):
                self._client.get(names, wanted, until, arrived)
        self._went_well()
        self.drop(bad)

    def _target(self, span: Span, lent: ExitStack) -> memoryview:
        """Return where a value goes: the slot, or memory to open it from."""
        if self._sealer is None:
            return span.frame
        return lent.enter_context(self._sealer.room(HEADER_BYTES + span.nbytes))

    def _open(self, span: Span, value: memoryview) -> None:
        """Have a value's block in its slot. Raises FrameError."""
        if self._sealer is not None:
            self._sealer.open(value, span.key, span.frame, span.nbytes)

    def _value(self, span: Span, lent: ExitStack) -> memoryview:
        """Return what is stored for a span."""
        if self._sealer is None:
            return span.frame[: span.nbytes]
        sealed = lent.enter_context(self._sealer.sealed(span.frame, span.nbytes))
        return sealed[: HEADER_BYTES + span.nbytes]

    def _write(self, batch: Sequence[Span], until: float, report: Report) -> None:
        now = self._clock()
        names = [self._name_of(span.key) for span in batch]
        with self._lock:
            if not self._full.closed and not self._full.trial(now):
                return
            for name in names:
                self._doomed.pop(name, None)  # it is written over
            # A deletion under way may come before or after: wait for it, or leave the block out.
            self._deleted.wait_for(
                lambda: self._deleting.isdisjoint(names), max(0.0, until - self._clock())
            )
            chosen = [index for index, name in enumerate(names) if name not in self._deleting]

        def stored(at: int, good: bool) -> None:
            with self._lock:
                if good:
                    self._full.succeeded()
                else:
                    self._full.failed(now)
            if not good:
                self._metrics.add("tier_failures", 1, tier=self.name)
            report(chosen[at], good)

        with ExitStack() as lent:
            values = [self._value(batch[index], lent) for index in chosen]
            with self._timed("write"):
                self._client.put([names[index] for index in chosen], values, until, stored)
        self._went_well()

    def _delete(self) -> None:
        """Delete what is doomed, all that has gathered; one thread at a time."""
        with self._lock:
            if self._deleting or not self._doomed or not self._breaker.closed:
                return
            names = list(self._doomed)[:DELETE_MAX]
            self._deleting = frozenset(names)
            for name in names:
                del self._doomed[name]
        done = False
        try:
            self._client.delete(names, self._clock() + self._timeout_s)
            self._went_well()
            done = True
        except OSError as error:
            self._failed(error)
            self._mend()  # and deletes then
        finally:
            with self._lock:
                self._deleting = frozenset()
                self._deleted.notify_all()
                if not done:
                    self._doomed |= dict.fromkeys(names)
                more = done and bool(self._doomed)
        if more:
            self._workers.submit(self._delete)

    def _timed(self, op: str) -> Timed:
        return Timed(partial(self._metrics.add, "op_seconds", op=op, tier=self.name), self._clock)


class Timed:
    """Observe how long a `with` block takes, whether it raises or not."""

    def __init__(self, observe: Callable[[float], None], clock: Callable[[], float]) -> None:
        self._observe = observe
        self._clock = clock
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = self._clock()

    def __exit__(self, *_: object) -> None:
        self._observe(self._clock() - self._start)


def _batches(spans: Sequence[Span], nbytes_max: int) -> Iterator[tuple[int, Sequence[Span]]]:
    """Yield (index of the first, spans) of at most so many bytes, at least one span each."""
    first, nbytes = 0, 0
    for index, span in enumerate(spans):
        if index > first and nbytes + span.nbytes > nbytes_max:
            yield first, spans[first:index]
            first, nbytes = index, 0
        nbytes += span.nbytes
    if first < len(spans):
        yield first, spans[first:]


def _shifted(report: Report, first: int, index: int, good: bool) -> None:
    report(first + index, good)


def _refuse(batch: Sequence[Span], report: Report) -> None:
    for index in range(len(batch)):
        report(index, False)
