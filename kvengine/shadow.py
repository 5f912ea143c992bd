"""Caches of metadata alone: what a policy would hold, and hit, without a byte behind it.

`Shadow` is one policy with room for so many pages; `trace.simulate` plays traces against it.
`Shadows` runs several on the traffic of an engine, beside its own policy, on a sample of the blocks
by their keys (spatial sampling: Waldspurger and others, FAST 2015). The rate halves when a shadow
holds more than SAMPLED_MAX blocks. A miss of the sample stands for so many; what is no miss is a
hit, so that it matters little whether the few blocks that everyone asks for are of the sample.

A shadow learns of blocks as the store does: a look-up touches them, a save brings them. What the
engine holds and a shadow does not is brought by the look-up, as whoever asked would have computed
and saved it. Pins, retention, drops and pools of other than full attention are not seen.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int64s
from kvengine.keys import BlockKeys
from kvengine.metrics import Metrics
from kvengine.policy import NO_PARENT, NO_REQUEST, Entries, Policy, Request, Run
from kvengine.policy.named import policy_of

PAGE_BYTES = 4096
SAMPLED_MAX = 2048  # blocks that one shadow holds: within a point of hit ratio on real chats
SAMPLE_SHIFT = 44  # the bits of a print that choose: policies use the lower ones
ENDS_MAX = 4096  # tables whose last block is known, for the saves that continue them
COUNT_EVERY = 64  # look-ups, from one bump of the metrics to the next
LIVE = "live"

Floats = NDArray[np.float64]
Evicted = Callable[[Entries], None]
Computing = Callable[
    [Int64s], Floats | None
]  # the seconds of computing a prompt's blocks, by index


class Shadow:
    """One policy, and which blocks it holds. Blocks are ids from 0 on; their owner names them."""

    def __init__(self, policy: Policy, pages: int, ids: int = 0) -> None:
        self.policy = policy
        self.free_pages = pages
        self.blocks = 0
        self._pages = np.zeros(ids, dtype=np.int32)  # of each block that is here

    def fit(self, ids: int) -> None:
        """Make room for ids up to so many."""
        if ids > len(self._pages):
            longer = np.zeros(max(ids, len(self._pages) * 3 // 2), dtype=np.int32)
            longer[: len(self._pages)] = self._pages
            self._pages = longer

    def holds(self, path: Entries) -> NDArray[np.bool_]:
        """Say for each block whether it is here."""
        here: NDArray[np.bool_] = self._pages[path] != 0
        return here

    def leading(self, path: Entries) -> int:
        """Count the leading blocks that are here."""
        here = self.holds(path)
        return len(path) if here.all() else int(here.argmin())

    def look(
        self, path: Entries, prints: Int64s, request: Request, now: float, evicted: Evicted
    ) -> int:
        """Look a prompt up from its start. Returns how many of its blocks are here.

        prints: of all its blocks, also those that have no id. `evicted` is told what has gone.
        """
        for gone in self.policy.expired(now):
            self.remove(gone)
            evicted(gone)
        prefix = path[: self.leading(path)]
        self.policy.held(prefix)
        self.policy.touched(Run(prefix, NO_PARENT, 0, PAGE_BYTES, prints, request), now)
        self.policy.freed(prefix)
        return len(prefix)

    def put(
        self,
        kept: Entries,
        rest: Entries,
        prints: Int64s,
        position: int,
        request: Request,
        now: float,
        evicted: Evicted,
        pages: int = 1,
    ) -> Entries:
        """Take in `rest`, which continues `kept`, as far as the policy makes room for it.

        prints and position are those of `rest`. Returns what was taken in.
        """
        above = int(kept[-1]) if len(kept) else NO_PARENT
        missing = len(rest) * pages - self.free_pages
        if missing > 0:
            self.policy.held(kept)
            incoming = Run(rest, above, position, pages * PAGE_BYTES, prints, request)
            for gone in self.policy.victims(missing * PAGE_BYTES, now, incoming):
                self.remove(gone)
                evicted(gone)
            self.policy.freed(kept)
        rest = rest[: max(0, self.free_pages // pages)]
        if len(rest):
            run = Run(rest, above, position, pages * PAGE_BYTES, prints[: len(rest)], request)
            self.policy.added(run, now)
            self._pages[rest] = pages
            self.free_pages -= pages * len(rest)
            self.blocks += len(rest)
        return rest

    def remove(self, gone: Entries) -> None:
        """Forget blocks that are here."""
        self.policy.removed(gone)
        self.free_pages += int(self._pages[gone].sum())
        self._pages[gone] = 0
        self.blocks -= len(gone)


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What one policy would have made of the traffic so far; estimates, from the sample.

    `saved_prefill_s`: seconds of computing that its hits made unnecessary, 0 where the engine was
    not told what computing takes.
    """

    lookup_blocks: int
    hit_blocks: int
    saved_prefill_s: float

    @property
    def hit_ratio(self) -> float:
        """Return hits over look-ups."""
        return self.hit_blocks / self.lookup_blocks if self.lookup_blocks else 0.0


class Shadows:
    """Several shadows of one engine with so many pages of memory. Any thread may call any verb."""

    def __init__(
        self,
        names: Sequence[str],
        pages: int,
        metrics: Metrics,
        sampled_max: int = SAMPLED_MAX,
    ) -> None:
        self._lock = threading.Lock()
        self._sampled_max = sampled_max
        self._metrics = metrics
        self._pages = pages
        self._mask = 0
        self._shadows = {name: Shadow(policy_of(name), pages) for name in names}
        self._ids: dict[int, int] = {}  # by print, of the blocks that a shadow holds
        self._prints: list[int] = []  # by id
        self._holders: list[int] = []  # by id: how many shadows hold it
        self._free: list[int] = []
        self._loose: list[int] = []  # ids that may have no holder any more
        self._ends: OrderedDict[int, int] = OrderedDict()  # last print → last sampled print
        self._lookups, self._lookup_s = 0, 0.0
        self._missed = dict.fromkeys((LIVE, *names), 0)
        self._missed_s = dict.fromkeys((LIVE, *names), 0.0)
        self._asked = 0
        self._told: dict[str, tuple[int, float]] = {}  # what the metrics say
        self._told_lookups = 0

    @property
    def nbytes(self) -> int:
        """Bytes of metadata in the policies."""
        return sum(shadow.policy.nbytes for shadow in self._shadows.values())

    def asked(
        self,
        keys: BlockKeys,
        in_memory: int,
        held: int,
        pages: int,
        request: Request | None,
        computing: Computing,
        now: float,
    ) -> None:
        """Take in a look-up of a whole prompt; those of a later part are left out.

        in_memory: how many leading blocks the engine has in memory; held: there and in tiers;
        pages: of one block.
        """
        if keys.position or keys.namespace.layout.attention != "full":
            return
        prints = keys.prints
        with self._lock:
            at, scale = self._sampled(prints), self._mask + 1
            self._lookups += len(prints)
            until = computing(np.concatenate([at, at + 1, [len(prints)]]))
            seconds = None
            if until is not None:
                self._lookup_s += float(until[-1])
                seconds = until[len(at) : -1] - until[: len(at)]
            if not len(at):
                return
            names = prints[at]
            tokens = keys.namespace.layout.block_tokens * scale
            about = replace(request or NO_REQUEST, block_tokens=tokens)
            self._count(LIVE, int(np.searchsorted(at, in_memory)), seconds, scale, len(at))
            stop = int(np.searchsorted(at, held))
            path = self._path(names)
            for name, shadow in self._shadows.items():
                shadow.fit(len(self._prints))
                count = shadow.look(path, names, about, now, self._loosen)
                self._count(name, count, seconds, scale, len(at))
                if count < stop:
                    self._put(shadow, names[:stop], count, int(at[count]), about, pages, now)
            self._note(prints, at, names, (in_memory, held, len(keys)))
            self._settle()
            self._asked += 1
            if self._asked % COUNT_EVERY == 0:
                self._bump()

    def saved(self, keys: BlockKeys, pages: int, now: float) -> None:
        """Take in what is saved."""
        if keys.namespace.layout.attention != "full":
            return
        prints = keys.prints
        with self._lock:
            at = self._sampled(prints)
            before = self._ends.get(_print(keys.parent)) if keys.position else None
            if len(at):
                names = prints[at]
                if before is not None:
                    names = np.concatenate([[before], names])
                    at = np.concatenate([[-1], at])
                for shadow in self._shadows.values():
                    shadow.fit(len(self._prints))
                    count = shadow.leading(self._path(names))
                    if count < len(names) and (count or before is None):
                        position = keys.position + int(at[count])
                        self._put(shadow, names, count, position, NO_REQUEST, pages, now)
                before = int(names[-1])
            if before is not None:
                self._end(int(prints[-1]), before)
            self._settle()

    def seen(self) -> dict[str, Shadowed]:
        """Return what each policy has made of it, and under "live" what the engine has."""
        with self._lock:
            self._bump()
            return {
                name: Shadowed(
                    self._lookups,
                    max(0, self._lookups - missed),
                    max(0.0, self._lookup_s - self._missed_s[name]),
                )
                for name, missed in self._missed.items()
            }

    # Under the lock

    def _sampled(self, prints: Int64s) -> Int64s:
        """Return which blocks are of the sample."""
        if not self._mask:
            return np.arange(len(prints))
        return np.flatnonzero((prints >> SAMPLE_SHIFT) & self._mask == 0)

    def _path(self, names: Int64s) -> Entries:
        """Return the ids of leading blocks, as far as they have one."""
        path = []
        for name in names.tolist():
            if (number := self._ids.get(name)) is None:
                break
            path.append(number)
        return np.array(path, dtype=np.int32)

    def _named(self, names: Int64s) -> Entries:
        """Return the ids of blocks; those that have none get one."""
        path = []
        for name in names.tolist():
            number = self._ids.get(name)
            if number is None:
                number = self._free.pop() if self._free else len(self._prints)
                if number == len(self._prints):
                    self._prints.append(name)
                    self._holders.append(0)
                self._prints[number] = name
                self._ids[name] = number
                self._loose.append(number)
            path.append(number)
        return np.array(path, dtype=np.int32)

    def _put(
        self,
        shadow: Shadow,
        names: Int64s,
        count: int,
        position: int,
        request: Request,
        pages: int,
        now: float,
    ) -> None:
        """Give a shadow the blocks after the first `count`, which it holds, up to one it holds."""
        path = self._named(names)
        if len(np.unique(path)) < len(path):
            return  # keys that were not formed as a chain
        shadow.fit(len(self._prints))
        rest = path[count:]
        here = shadow.holds(rest)
        rest = rest[: int(here.argmax()) if here.any() else len(rest)]
        named = names[count : count + len(rest)]
        scaled = position // (self._mask + 1)
        taken = shadow.put(path[:count], rest, named, scaled, request, now, self._loosen, pages)
        for number in taken.tolist():
            self._holders[number] += 1

    def _loosen(self, gone: Entries) -> None:
        for number in gone.tolist():
            self._holders[number] -= 1
            self._loose.append(number)

    def _settle(self) -> None:
        """Give ids back that no shadow holds; halve the sample where it has grown too large."""
        while any(shadow.blocks > self._sampled_max for shadow in self._shadows.values()):
            self._halve()
        for number in self._loose:
            name = self._prints[number]
            if not self._holders[number] and self._ids.get(name) == number:
                del self._ids[name]
                self._free.append(number)
        self._loose.clear()

    def _halve(self) -> None:
        before, self._mask = self._mask + 1, 2 * self._mask + 1
        prints = np.array(self._prints, dtype=np.int64)
        out = np.flatnonzero((prints >> SAMPLE_SHIFT) & self._mask != 0).astype(np.int32)
        for shadow in self._shadows.values():
            shadow.fit(len(prints))
            gone = out[shadow.holds(out)]
            shadow.remove(gone)
            self._loosen(gone)
            shadow.free_pages -= self._pages // before - self._pages // (self._mask + 1)

    def _note(self, prints: Int64s, at: Int64s, names: Int64s, stops: Sequence[int]) -> None:
        """Remember what stands before what a save may begin with."""
        for stop in set(stops):
            if (count := int(np.searchsorted(at, stop))) and stop:
                self._end(int(prints[stop - 1]), int(names[count - 1]))

    def _end(self, last: int, sampled: int) -> None:
        self._ends[last] = sampled
        self._ends.move_to_end(last)
        if len(self._ends) > ENDS_MAX:
            self._ends.popitem(last=False)

    def _count(self, name: str, hits: int, seconds: Floats | None, scale: int, total: int) -> None:
        self._missed[name] += (total - hits) * scale
        if seconds is not None:
            self._missed_s[name] += scale * float(seconds[hits:].sum())

    def _bump(self) -> None:
        """Bring the metrics up to what was counted."""
        self._metrics.add("shadow_lookup_blocks", self._lookups - self._told_lookups)
        self._told_lookups = self._lookups
        for name, missed in self._missed.items():
            before, before_s = self._told.get(name, (0, 0.0))
            self._told[name] = missed, self._missed_s[name]
            self._metrics.add("shadow_missed_blocks", missed - before, policy=name)
            spent = self._missed_s[name] - before_s
            self._metrics.add("shadow_missed_prefill_seconds", spent, policy=name)


def _print(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)
