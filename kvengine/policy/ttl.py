"""Blocks live a set time after their last use, as providers sell it; else LRU, leaf first."""

from __future__ import annotations

from collections.abc import Iterator

from kvengine.compiled import Int32s, column, compiled
from kvengine.policy import Entries, Run, UnknownPolicy
from kvengine.policy.queues import (
    Queues,
    enter,
    leave,
    link_newest,
    oldest,
    pages_of,
    renew,
    restore,
    take,
)

TTL_S = 300.0
TTL_S_MAX = 1e7
TICKS_A_SECOND = 16


@compiled
def _add(
    nodes: Int32s, used: Int32s, entries: Int32s, count: int, above: int, pages: int, tick: int
) -> None:
    for i in range(count):
        node = entries[i] + 1
        enter(nodes, node, above, pages, tick)
        nodes[node * 12 + 8] = 0
        above = node
    for i in range(count - 1, -1, -1):
        link_newest(nodes, used, entries[i] + 1)


@compiled
def _touch(nodes: Int32s, used: Int32s, entries: Int32s, count: int, tick: int) -> None:
    for i in range(count - 1, -1, -1):
        node = entries[i] + 1
        if nodes[node * 12 + 6] != 0:
            nodes[node * 12 + 9] = tick
            renew(nodes, used, node, 0)


@compiled
def _remove(nodes: Int32s, used: Int32s, entries: Int32s, count: int) -> None:
    for i in range(count):
        node = entries[i] + 1
        if nodes[node * 12 + 6] != 0:
            leave(nodes, used, node)


@compiled
def _victims(nodes: Int32s, used: Int32s, pages: int, before: int, out: Int32s, room: int) -> int:
    # Blocks whose last use was before tick `before`, oldest first.
    found = 0
    while pages > 0 and found < room:
        node = oldest(nodes, used, 0)
        if node < 0 or nodes[node * 12 + 9] >= before:
            break
        take(nodes, used, node)
        out[found] = node - 1
        found += 1
        pages -= nodes[node * 12 + 7]
    restore(nodes, used, 1, out, found)
    out[room] = max(pages, 0)
    return found


class TTL:
    """Give up what was not used for `ttl_s` seconds, and the least recently used under pressure."""

    def __init__(self, ttl_s: float = TTL_S) -> None:
        if not 0 < ttl_s <= TTL_S_MAX:
            raise UnknownPolicy(
                f"ttl_s: given {ttl_s!r}, expected a number of seconds above 0, up to {TTL_S_MAX:g}"
            )
        self._queues = Queues(1)
        self._ttl_ticks = int(ttl_s * TICKS_A_SECOND)
        self._origin: float | None = None
        self._tick = 0

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return self._queues.nbytes

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena, as used now."""
        queues = self._queues
        queues.fit(run.entries)
        _add(
            column(queues.nodes), column(queues.used), column(run.entries), len(run.entries),
            queues.parent(run), pages_of(run.entry_bytes), self._at(now),
        )  # fmt: skip

    def touched(self, run: Run, now: float) -> None:
        """Start the time of blocks anew."""
        queues, known = self._queues, self._queues.known(run.entries)
        nodes, used = column(queues.nodes), column(queues.used)
        _touch(nodes, used, column(known), len(known), self._at(now))

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        self._queues.hold(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, the newest of all."""
        self._queues.release(entries, self._tick, recent=True)

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena."""
        queues, known = self._queues, self._queues.known(entries)
        _remove(column(queues.nodes), column(queues.used), column(known), len(known))

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates, the oldest first, leaves before their parents."""
        return self._oldest(pages_of(nbytes), (1 << 31) - 1)

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield the blocks whose time is over."""
        return self._oldest((1 << 31) - 1, self._at(now) - self._ttl_ticks + 1)

    def _oldest(self, pages: int, before: int) -> Iterator[Entries]:
        queues = self._queues

        def step(pages: int, out: Int32s, room: int) -> int:
            nodes, used = column(queues.nodes), column(queues.used)
            return _victims(nodes, used, pages, before, column(out), room)

        return queues.walk(pages, step)

    def _at(self, now: float) -> int:
        if self._origin is None:
            self._origin = now
        self._tick = max(self._tick, int((now - self._origin) * TICKS_A_SECOND))
        return self._tick
