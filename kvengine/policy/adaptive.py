"""Evict what is worth the least, as learned from this traffic; never far from LRU.

Blocks wait in one queue for each class (`books`), by last use, leaves first. The victim is the
oldest of the class whose index (`hazards`) at that age is the lowest: a tournament over the heads
of the classes, O(log classes) a step, and blocks of one run leave together, since they share class
and age. New blocks that are worth less than what they would push out do not come in. Two shadow
caches of a sample of the blocks (`shadows`) say whether that has hit more than LRU would have;
where it has not, the oldest block of all leaves.

With one class and no guard this is LRU. In plain Python it is right but slow, so the engine takes
LRU there (`named`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s, Int64s, column, column64, compiled
from kvengine.policy import Entries, Run
from kvengine.policy.books import (
    CLASSES,
    FEATURES,
    FOLLOW,
    GROWN,
    GUARDED,
    LEARN_AT,
    RECORD_WIDTH,
    RECORDS,
    TICK,
    TICKS_A_SECOND,
    Books,
    fast,
    new_books,
    strides_of,
)
from kvengine.policy.hazards import LEARN_FIRST, key_of, learn, levels_of
from kvengine.policy.queues import (
    WALK_MAX,
    Queues,
    enter,
    hold,
    leave,
    link_newest,
    oldest,
    pages_of,
    parent_of,
    release,
    renew,
    restore,
    take,
)
from kvengine.policy.shadows import RECORDS_MAX, class_of, observe, rebuild, seek
from kvengine.policy.tournament import dismiss, enrol, settle

ALL = tuple(name for name, _ in FEATURES)
RECORDS_MIN = 1024


@compiled
def _learn_in_time(books: Books) -> None:
    # Often at first, then every so many requests.
    if books.numbers[9] >= books.numbers[10]:
        learn(books)
        books.numbers[10] += min(1024, max(32, books.numbers[9] // 4))


@compiled
def _touch(
    books: Books, entries: Int32s, count: int, names: Int64s, output: int, stop: int,
    block_tokens: int,
) -> None:  # fmt: skip
    nodes, used, records, found = books.nodes, books.used, books.records, books.found
    strides, numbers = books.strides, books.numbers
    shift = numbers[12]
    last = -1
    if count > 0 and nodes[(entries[count - 1] + shift) * 12 + 6] != 0:
        last = int(nodes[(entries[count - 1] + shift) * 12 + 9])
    total = len(names)
    observe(books, names, total, last, count, output, stop, block_tokens)
    _learn_in_time(books)
    tick, base, fork = numbers[0], numbers[14], numbers[16]
    for i in range(count - 1, -1, -1):
        node = entries[i] + shift
        if nodes[node * 12 + 6] == 0:
            continue
        uses = nodes[node * 12 + 10] + 1
        if i < total and found[i] >= 0:
            uses = records[found[i] * 12 + 5]
        nodes[node * 12 + 10] = uses
        nodes[node * 12 + 9] = tick
        renew(nodes, used, node, class_of(strides, base, uses, i < fork))


@compiled
def _inherited(books: Books, above: int) -> int:
    # The part of a parent's class that belongs to the request.
    nodes, strides = books.nodes, books.strides
    if above < 0 or nodes[above * 12 + 6] == 0:
        return 0
    which = int(nodes[above * 12 + 8])
    for feature in range(4, 6):
        stride = strides[feature]
        if stride > 0:
            which -= int(stride * (which // stride % levels_of(feature)))
    return which


@compiled
def _add(
    books: Books, entries: Int32s, count: int, names: Int64s, above: int, pages: int
) -> None:  # fmt: skip
    nodes, used, numbers = books.nodes, books.used, books.numbers
    records, prints, buckets = books.records, books.prints, books.buckets
    shift, tick, mask = numbers[12], numbers[0], numbers[3]
    which, uses = _inherited(books, above), 0
    for i in range(count):
        node = entries[i] + shift
        enter(nodes, node, above, pages, tick)
        above = node
    named = len(names) == count
    for i in range(count - 1, -1, -1):
        node = entries[i] + shift
        record = seek(records, prints, buckets, mask, names[i]) if named else -2
        if record >= 0:
            which, uses = int(records[record * 12 + 3]), int(records[record * 12 + 5])
        nodes[node * 12 + 8] = which
        nodes[node * 12 + 10] = uses
        link_newest(nodes, used, node)
    numbers[2] += count


@compiled
def _remove(books: Books, entries: Int32s, count: int) -> None:
    nodes, used, numbers = books.nodes, books.used, books.numbers
    shift = numbers[12]
    for i in range(count):
        node = entries[i] + shift
        if nodes[node * 12 + 6] != 0:
            leave(nodes, used, node)
            numbers[2] -= 1


@compiled
def _line_up(books: Books) -> int:
    # All classes that have a candidate. Returns how many.
    nodes, used, lru = books.nodes, books.used, books.numbers[8]
    heads, players, places = books.heads, books.players, books.places
    count = 0
    for which in range(books.numbers[12]):
        places[which] = -1
        if used[which] != 0:
            node = oldest(nodes, used, which)
            if node >= 0:
                key = key_of(books, lru, which, nodes[node * 12 + 9])
                count = enrol(heads, players, places, count, which, key)
    return count


@compiled
def _victims(books: Books, pages: int, limit: int, out: Int32s, room: int) -> int:
    # The least worth first, as long as they are worth less than `limit`.
    nodes, used, shift, lru = books.nodes, books.used, books.numbers[12], books.numbers[8]
    heads, players, places = books.heads, books.players, books.places
    found, count, last = 0, _line_up(books), -1
    while pages > 0 and found < room and count > 0:
        which = int(players[0])
        node = oldest(nodes, used, which)
        if node < 0:
            count = dismiss(heads, players, places, count)
            last = -1
            continue
        if nodes[node * 12 + 9] != last:  # another run: is its class the first still?
            last = int(nodes[node * 12 + 9])
            key = key_of(books, lru, which, last)
            if key != heads[0]:
                heads[0] = key
                settle(heads, players, places, count, 0)
                last = -1
                continue
        if heads[0] >= limit:
            break
        parent = parent_of(nodes, node)
        take(nodes, used, node)
        out[found] = node - shift
        found += 1
        pages -= nodes[node * 12 + 7]
        if parent >= 0 and nodes[parent * 12 + 6] == 1 and nodes[parent * 12 + 8] != which:
            # It may be the head of its class now.
            other = int(nodes[parent * 12 + 8])
            if nodes[other * 12 + 1] == parent and nodes[parent * 12 + 4] == 0:
                if nodes[parent * 12 + 11] == 0:
                    key = key_of(books, lru, other, nodes[parent * 12 + 9])
                    count = enrol(heads, players, places, count, other, key)
                    last = -1
    restore(nodes, used, shift, out, found)
    out[room] = max(pages, 0)
    return found


@compiled
def _limit(books: Books, above: int, names: Int64s, count: int) -> int:
    # What new blocks under a node are worth: the deepest of them, which would leave first.
    numbers = books.numbers
    if numbers[8] != 0 or numbers[11] == 0 or numbers[12] == 1:
        return 4611686018427387904
    which = _inherited(books, above)
    for i in range(count - 1, -1, -1):
        record = seek(books.records, books.prints, books.buckets, numbers[3], names[i])
        if record >= 0:
            which = int(books.records[record * 12 + 3])
            break
    return key_of(books, 0, which, numbers[0])


@compiled
def _press(books: Books) -> None:
    # The memory is full: so many blocks are what it holds.
    books.numbers[1] = max(books.numbers[2], books.numbers[1] * 63 // 64)


@compiled
def _replay(
    books: Books, nodes: Int32s, offsets: Int64s, requests: int, prints: Int64s, names: Int64s,
    ticks: Int64s, outputs: Int32s, stops: Int32s, block_tokens: int, capacity: int,
    score_from: int, out: Int32s,
) -> tuple[int, int]:  # fmt: skip
    held, used, numbers, shift = books.nodes, books.used, books.numbers, books.numbers[12]
    room = len(out) - 1
    hits, evictions = 0, 0
    for r in range(requests):
        first, total = offsets[r], int(offsets[r + 1] - offsets[r])
        path = nodes[first : first + total]
        numbers[0] = max(numbers[0], ticks[r])
        count = 0
        while count < total and held[(path[count] + shift) * 12 + 6] != 0:
            count += 1
        hits += count if r >= score_from else 0
        for i in range(total):
            names[i] = prints[path[i]]
        prefix = path[:count]
        hold(held, shift, prefix, count)
        _touch(books, prefix, count, names[:total], outputs[r], stops[r], block_tokens)
        missing = total - count - (capacity - numbers[2])
        above = path[count - 1] + shift if count > 0 else -1
        limit = 0
        if missing > 0:
            _press(books)
            limit = _limit(books, above, names[count:total], total - count)
        while missing > 0:
            found = _victims(books, missing, limit, out, min(max(1, missing), room))
            if found == 0:
                break
            _remove(books, out, found)
            evictions += found
            missing -= found
        release(held, used, shift, prefix, count, numbers[0], 1)
        fitting = int(min(total - count, capacity - numbers[2]))
        _add(
            books, path[count : count + fitting], fitting, names[count : count + fitting], above, 1
        )
    return hits, evictions


class Adaptive:
    """Evict the block whose class and age promise the least, or LRU's where that does better.

    `features` picks what classes are made of (none: one class); `guard` False follows the index
    whatever the shadows say.
    """

    def __init__(self, features: Sequence[str] = ALL, guard: bool = True) -> None:
        strides, classes = strides_of(features)
        self._queues = Queues(classes)
        self._columns = new_books(strides, classes, RECORDS_MIN)
        self._numbers = self._columns.numbers
        self._numbers[GUARDED], self._numbers[LEARN_AT] = int(guard), LEARN_FIRST
        self._origin: float | None = None
        self._books = self._columns
        self._grow_records(RECORDS_MIN)

    @property
    def nbytes(self) -> int:
        """Bytes of metadata held."""
        return sum(each.nbytes for each in self._columns)

    @property
    def follows(self) -> str:
        """Say what the guard follows now: "index" or "lru"."""
        return "lru" if self._numbers[FOLLOW] else "index"

    def added(self, run: Run, now: float) -> None:
        """Take in blocks that are now in the arena, as used now."""
        queues = self._queues
        self._at(now)
        queues.fit(run.entries)
        if queues.nodes is not self._columns.nodes:
            self._use(self._columns)
        _add(
            self._books, column(run.entries), len(run.entries), column64(run.prints),
            queues.parent(run), pages_of(run.entry_bytes),
        )  # fmt: skip

    def touched(self, run: Run, now: float) -> None:
        """Learn from a request, and move its blocks to the class that they are of now."""
        self._at(now)
        self._fit_request(len(run.prints))
        known = self._queues.known(run.entries)
        request = run.request
        _touch(
            self._books, column(known), len(known), column64(run.prints), request.output_tokens,
            request.stop, request.block_tokens,
        )  # fmt: skip

    def held(self, entries: Entries) -> None:
        """Leave blocks out of the candidates."""
        self._queues.hold(entries)

    def freed(self, entries: Entries) -> None:
        """Make held blocks candidates again, the newest of their class."""
        self._queues.release(entries, int(self._numbers[TICK]), recent=True)

    def removed(self, entries: Entries) -> None:
        """Forget blocks that have left the arena; their prints stay a while."""
        known = self._queues.known(entries)
        _remove(self._books, column(known), len(known))

    def victims(self, nbytes: int, now: float, incoming: Run | None = None) -> Iterator[Entries]:
        """Yield candidates, the least worth first, leaves before their parents."""
        pages = pages_of(nbytes)
        room = min(max(1, pages), WALK_MAX)
        out = np.empty(room + 1, dtype=np.int32)
        if pages > 0:
            self._at(now)
            _press(self._books)
        limit = 1 << 62
        if incoming is not None:
            prints = column64(incoming.prints)
            above = self._queues.parent(incoming)
            limit = _limit(self._books, above, prints, len(incoming.prints))
        while pages > 0:
            found = _victims(self._books, pages, limit, column(out), room)
            if found == 0:
                return
            entries = out[:found].copy()
            pages = int(out[room])
            yield entries
            if self._queues.present(int(entries[0])):
                return  # the caller took none: the same would come again

    def expired(self, now: float) -> Iterator[Entries]:
        """Yield nothing: no block has a time."""
        return iter(())

    def replay(
        self,
        nodes: Int32s,
        offsets: Int64s,
        prints: Int64s,
        seconds: NDArray[np.float64],
        output_tokens: Int32s,
        stops: Int32s,
        block_tokens: int,
        capacity: int,
        score_from: int,
    ) -> tuple[int, int]:
        """Play a trace in one loop (`trace.simulate`). Returns hits and evictions."""
        longest = int(np.diff(offsets).max(initial=0))
        self._queues.fit(np.array([len(prints) - 1], dtype=np.int32))
        records = min(RECORDS_MAX, len(prints) + longest)
        if self._numbers[GROWN] < records:
            self._grow_records(records)
        self._fit_request(longest)
        self._use(self._columns)
        ticks = ((seconds - seconds[:1]) * TICKS_A_SECOND).astype(np.int64)
        hits, evictions = _replay(
            self._books, column(nodes), column64(offsets), len(seconds), column64(prints),
            column64(np.zeros(longest + 1, dtype=np.int64)), column64(ticks),
            column(output_tokens), column(stops), block_tokens, capacity, score_from,
            column(np.zeros(WALK_MAX + 1, dtype=np.int32)),
        )  # fmt: skip
        return int(hits), int(evictions)

    def _at(self, now: float) -> None:
        if self._origin is None:
            self._origin = now
        tick = int((now - self._origin) * TICKS_A_SECOND)
        self._numbers[TICK] = max(int(self._numbers[TICK]), tick)

    def _fit_request(self, blocks: int) -> None:
        have = int(self._numbers[GROWN])
        if have < RECORDS_MAX and int(self._numbers[RECORDS]) + blocks > have:
            self._grow_records(min(RECORDS_MAX, max(2 * have, have + blocks)))
        if blocks > len(self._columns.found):
            self._use(self._columns._replace(found=np.zeros(2 * blocks, dtype=np.int32)))

    def _grow_records(self, count: int) -> None:
        columns, classes = self._columns, int(self._numbers[CLASSES])
        before, size = len(columns.prints), classes + 1 + count
        records = np.zeros(RECORD_WIDTH * size, dtype=np.int32)
        records[: len(columns.records)] = columns.records
        prints = np.zeros(size, dtype=np.int64)
        prints[:before] = columns.prints
        # The free ones are a chain that begins at the end of the list.
        chain = np.arange(before + 1, size + 1, dtype=np.int32)
        chain[-1] = records[RECORD_WIDTH * classes]
        records[RECORD_WIDTH * before :: RECORD_WIDTH] = chain
        records[RECORD_WIDTH * classes] = before
        self._numbers[GROWN] = count
        buckets = columns.buckets
        if len(buckets) < count:
            buckets = np.full(1 << (count - 1).bit_length(), -1, dtype=np.int32)
        self._use(columns._replace(records=records, prints=prints, buckets=buckets))
        rebuild(self._books)

    def _use(self, columns: Books) -> None:
        """Take in columns that have grown."""
        nodes, used = self._queues.nodes, self._queues.used
        self._columns = columns._replace(nodes=nodes, used=used)
        self._books = Books(*map(fast, self._columns))  # type: ignore[arg-type]  # each as it was
