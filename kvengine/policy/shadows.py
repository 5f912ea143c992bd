"""What the `adaptive` policy has seen: a sample of blocks by their prints, resident or not.

Every record is in one list by last use. Its newest part is what an LRU cache of our size would
hold: the first shadow. The second holds what this policy would hold, in queues by class. A request
is counted as a hit in either as far as its sampled blocks are there from its start on; the guard
follows the shadow that has hit more of late. The sample halves when the records do not reach back
far enough for the size of the cache (Waldspurger and others, FAST 2015).
"""

from __future__ import annotations

from kvengine.compiled import Int32s, Int64s, compiled
from kvengine.policy.books import Books
from kvengine.policy.hazards import bin_of, key_of
from kvengine.policy.tournament import dismiss, enrol, settle

RECORDS_MAX = 1 << 16
REACH = 4  # the list reaches back so many times the size of the cache


@compiled
def seek(
    records: Int32s, prints: Int64s, buckets: Int32s, sample_mask: int, block_print: int
) -> int:
    """Return a block's record, -1 where it has none, -2 where it is not of the sample."""
    if block_print & sample_mask != 0:
        return -2
    record = int(buckets[(block_print >> 20) & (len(buckets) - 1)])
    while record >= 0 and prints[record] != block_print:
        record = int(records[record * 12])
    return record


@compiled
def rebuild(books: Books) -> None:
    """Put all records into buckets, after the buckets have grown."""
    records, prints, buckets = books.records, books.prints, books.buckets
    for at in range(len(buckets)):
        buckets[at] = -1
    end = int(books.numbers[12])
    record = int(records[end * 12 + 2])
    while record != end:
        at = (prints[record] >> 20) & (len(buckets) - 1)
        records[record * 12] = buckets[at]
        buckets[at] = record
        record = int(records[record * 12 + 2])


@compiled
def _unlink(records: Int32s, record: int, before: int) -> None:
    # `before`: the column of the link back, 1 of the list by last use, 7 of the shadow's queues.
    back, on = records[record * 12 + before], records[record * 12 + before + 1]
    records[back * 12 + before + 1] = on
    records[on * 12 + before] = back


@compiled
def _link(records: Int32s, record: int, end: int, before: int) -> None:
    last = records[end * 12 + before]
    records[record * 12 + before] = last
    records[record * 12 + before + 1] = end
    records[last * 12 + before + 1] = record
    records[end * 12 + before] = record


@compiled
def _orphan(records: Int32s, record: int) -> int:
    # One child less in the shadow. Returns the parent where it waited for that, in its queue now.
    parent = int(records[record * 12 + 10])
    records[record * 12 + 10] = -1
    if parent < 0:
        return -1
    records[parent * 12 + 11] -= 1
    flags = records[parent * 12 + 6]
    if records[parent * 12 + 11] > 0 or flags & 8 == 0:
        return -1
    records[parent * 12 + 6] = flags & ~8
    which = int(records[parent * 12 + 3])
    first = records[which * 12 + 8]
    records[parent * 12 + 7] = which
    records[parent * 12 + 8] = first
    records[first * 12 + 7] = parent
    records[which * 12 + 8] = parent
    return parent


@compiled
def _erase(records: Int32s, prints: Int64s, buckets: Int32s, numbers: Int64s, record: int) -> None:
    flags = records[record * 12 + 6]
    if flags & 2 != 0:
        if flags & 8 == 0:
            _unlink(records, record, 7)
        _orphan(records, record)
        numbers[6] -= 1
    if flags & 1 != 0:
        if numbers[7] == record:
            numbers[7] = records[record * 12 + 2]
        numbers[5] -= 1
    _unlink(records, record, 1)
    end = int(numbers[12])
    at = (prints[record] >> 20) & (len(buckets) - 1)
    other = int(buckets[at])
    if other == record:
        buckets[at] = records[record * 12]
    else:
        while records[other * 12] != record:
            other = int(records[other * 12])
        records[other * 12] = records[record * 12]
    records[record * 12] = records[end * 12]
    records[end * 12] = record
    numbers[4] -= 1


@compiled
def _censor(books: Books) -> None:
    # The oldest record is lost sight of.
    records, numbers = books.records, books.numbers
    record = int(records[int(numbers[12]) * 12 + 2])
    age = int(numbers[0] - records[record * 12 + 4])
    books.censored[records[record * 12 + 3] * 40 + bin_of(age)] += 1.0
    _erase(records, books.prints, books.buckets, numbers, record)


@compiled
def _halve(books: Books) -> None:
    # Half of the blocks leave the sample, and with them half of what is known of each class.
    records, prints, buckets, numbers = books.records, books.prints, books.buckets, books.numbers
    numbers[3] = numbers[3] * 2 + 1
    end = int(numbers[12])
    record = int(records[end * 12 + 2])
    while record != end:
        following = int(records[record * 12 + 2])
        if prints[record] & numbers[3] != 0:
            _erase(records, prints, buckets, numbers, record)
        record = following
    record = int(records[end * 12 + 2])
    while record != end:  # parents may have gone: who waits for children waits no more
        records[record * 12 + 10] = -1
        records[record * 12 + 11] = 0
        if records[record * 12 + 6] & 8 != 0:
            records[record * 12 + 6] &= ~8
            _link(records, record, int(records[record * 12 + 3]), 7)
            books.shadow_used[records[record * 12 + 3]] = 1
        record = int(records[record * 12 + 2])
    for at in range(end * 40):
        books.events[at] *= 0.5
        books.censored[at] *= 0.5
    numbers[15] //= 2
    books.balance[0] *= 0.5
    books.balance[1] *= 0.5


@compiled
def _make_room(books: Books, names: Int64s, total: int) -> None:
    # For as many new records as this request may need.
    numbers = books.numbers
    while True:
        need = 0
        for i in range(total):
            if names[i] & numbers[3] == 0:
                need += 1
        free = numbers[17] - numbers[4]
        if need <= free:
            return
        reach = (numbers[3] + 1) * numbers[4]
        if reach < 4 * numbers[1] or 4 * need > numbers[17]:
            _halve(books)
            continue
        while need > free:
            _censor(books)
            free += 1
        return


@compiled
def _new_record(
    records: Int32s, prints: Int64s, buckets: Int32s, numbers: Int64s, block_print: int
) -> int:
    end = int(numbers[12])
    record = int(records[end * 12])
    records[end * 12] = records[record * 12]
    at = (block_print >> 20) & (len(buckets) - 1)
    records[record * 12] = buckets[at]
    buckets[at] = record
    prints[record] = block_print
    for each in range(3, 12):
        records[record * 12 + each] = 0
    records[record * 12 + 10] = -1
    numbers[4] += 1
    return record


@compiled
def _renew(
    records: Int32s, shadow_used: Int32s, numbers: Int64s, record: int, which: int, fresh: bool
) -> None:
    # The newest of all, and in both shadows.
    end = int(numbers[12])
    flags = records[record * 12 + 6]
    if not fresh:
        if flags & 1 != 0 and numbers[7] == record:
            numbers[7] = records[record * 12 + 2]
        _unlink(records, record, 1)
        if flags & 10 == 2:
            _unlink(records, record, 7)
    _link(records, record, end, 1)
    if flags & 1 == 0:
        numbers[5] += 1
    if flags & 2 == 0:
        numbers[6] += 1
    if numbers[5] == 1 or numbers[7] == end:
        numbers[7] = record
    _link(records, record, which, 7)
    shadow_used[which] = 1
    records[record * 12 + 3] = which
    records[record * 12 + 4] = numbers[0]
    records[record * 12 + 6] = (flags & ~8) | 3


@compiled
def _shrink_own(books: Books, size: int) -> None:
    records, numbers, shadow_used = books.records, books.numbers, books.shadow_used
    heads, players, places = books.heads, books.players, books.places
    count = 0
    for which in range(numbers[12]):
        places[which] = -1
        if shadow_used[which] != 0:
            head = records[which * 12 + 8]
            if head == which:
                shadow_used[which] = 0
            else:
                key = key_of(books, 0, which, records[head * 12 + 4])
                count = enrol(heads, players, places, count, which, key)
    which, last, key = 0, -1, 0
    while numbers[6] > size and count > 0:
        which = int(players[0])
        head = records[which * 12 + 8]
        if head == which:
            count = dismiss(heads, players, places, count)
            last = -1
            continue
        if records[head * 12 + 11] > 0:
            _unlink(records, int(head), 7)
            records[head * 12 + 6] |= 8
            continue
        if records[head * 12 + 4] != last:
            last = int(records[head * 12 + 4])
            key = key_of(books, 0, which, last)
            if key != heads[0]:
                heads[0] = key
                settle(heads, players, places, count, 0)
                last = -1
                continue
        _unlink(records, int(head), 7)
        records[head * 12 + 6] &= ~2
        numbers[6] -= 1
        parent = _orphan(records, int(head))
        if parent >= 0:
            other = int(records[parent * 12 + 3])
            shadow_used[other] = 1
            if other != which:
                key = key_of(books, 0, other, records[parent * 12 + 4])
                count = enrol(heads, players, places, count, other, key)
            last = -1


@compiled
def _shrink(books: Books) -> None:
    # Both shadows to the size that the cache has, in sampled blocks. Before it was full: no limit.
    records, numbers = books.records, books.numbers
    if numbers[1] == 0:
        return
    size = int(numbers[1] // (numbers[3] + 1))
    while numbers[5] > size:
        record = numbers[7]
        records[record * 12 + 6] &= ~1
        numbers[7] = records[record * 12 + 2]
        numbers[5] -= 1
    if numbers[6] > size:
        _shrink_own(books, size)


@compiled
def _weigh(books: Books, total: int) -> None:
    # The guard: who has hit more, over the last few times that the cache was filled anew.
    found, records, numbers = books.found, books.records, books.numbers
    lru, own, in_lru, in_own, sampled = 0, 0, True, True, 0
    for i in range(total):
        record = found[i]
        if record == -2:
            continue
        sampled += 1
        flags = records[record * 12 + 6] if record >= 0 else 0
        in_lru = in_lru and flags & 1 != 0
        in_own = in_own and flags & 2 != 0
        lru += 1 if in_lru else 0
        own += 1 if in_own else 0
    numbers[15] += sampled
    if numbers[13] == 0 or numbers[1] == 0:
        return
    span = 4096.0 + 8.0 * (numbers[1] // (numbers[3] + 1))
    fade = 0.5 ** (sampled / span)
    books.balance[0] = books.balance[0] * fade + (own - lru)
    books.balance[1] = books.balance[1] * fade + sampled
    lead = books.balance[0] / max(1.0, books.balance[1])
    if numbers[8] == 0 and lead < -0.002:
        numbers[8] = 1
    elif numbers[8] != 0 and lead > 0.0:
        numbers[8] = 0


@compiled
def _level_output(tokens: int) -> int:
    return 0 if tokens < 128 else (1 if tokens < 256 else 2)


@compiled
def _level_gap(ticks: int) -> int:
    level, quarter = 1, ticks // 64
    while quarter > 0 and level < 6:
        quarter >>= 1
        level += 1
    return level


@compiled
def _level_new(tokens: int) -> int:
    level = 0
    kilo = tokens // 1024
    while kilo > 0 and level < 4:
        kilo >>= 1
        level += 1
    return level


@compiled
def _look(books: Books, names: Int64s, total: int, here: int, last: int) -> int:
    # Finds the records of a prompt. Sets how many of its blocks are known and shared; returns when
    # the deepest known one was last used, -1 where none is known.
    records, prints, buckets = books.records, books.prints, books.buckets
    numbers, found = books.numbers, books.found
    known, latest, fork, child = here, last, 0, 0
    for i in range(total - 1, -1, -1):
        record = seek(records, prints, buckets, numbers[3], names[i])
        found[i] = record
        if record == -2:
            continue
        if record >= 0:
            if i >= known or latest < 0:
                known, latest = i + 1, int(records[record * 12 + 4])
            if child != 0:
                if records[record * 12 + 9] == 0:
                    records[record * 12 + 9] = child
                elif records[record * 12 + 9] != child:
                    records[record * 12 + 6] |= 4
            if fork == 0 and records[record * 12 + 6] & 4 != 0:
                fork = i + 1
        child = int(((names[i] >> 8) & 0x7FFFFFFF) | 1)
    numbers[18] = known
    numbers[16] = fork
    return latest


@compiled
def observe(
    books: Books, names: Int64s, total: int, last: int, here: int, output: int, stop: int,
    block_tokens: int,
) -> None:  # fmt: skip
    """Take in a request: the prints of its blocks, of which `here` are resident, used `last`.

    Leaves the request's part of the class in BASE, and in FORK_AT how many of its blocks other
    prompts share; `found` names the records of its blocks.
    """
    _make_room(books, names, total)
    latest = _look(books, names, total, here, last)
    _weigh(books, total)
    records, prints, buckets = books.records, books.prints, books.buckets
    numbers, found, strides, events = books.numbers, books.found, books.strides, books.events
    shadow_used = books.shadow_used
    gap = _level_gap(int(numbers[0] - latest)) if latest >= 0 else 0
    base = strides[0] * _level_output(output) + strides[1] * gap + strides[2] * stop
    base += strides[3] * _level_new(int((total - numbers[18]) * block_tokens))
    numbers[14] = base
    fork, child, below = numbers[16], 0, -1
    for i in range(total - 1, -1, -1):
        record = int(found[i])
        if record == -2:
            continue
        fresh = record == -1
        if fresh:
            record = _new_record(records, prints, buckets, numbers, names[i])
            found[i] = record
            records[record * 12 + 9] = child
        else:
            age = int(numbers[0] - records[record * 12 + 4])
            events[records[record * 12 + 3] * 40 + bin_of(age)] += 1.0
            records[record * 12 + 5] += 1
        which = class_of(strides, base, records[record * 12 + 5], i < fork)
        if below >= 0:
            records[below * 12 + 10] = record
            records[record * 12 + 11] += 1
        below = record if records[record * 12 + 6] & 2 == 0 else -1
        _renew(records, shadow_used, numbers, record, which, fresh)
        child = int(((names[i] >> 8) & 0x7FFFFFFF) | 1)
    _shrink(books)
    numbers[9] += 1


@compiled
def class_of(strides: Int64s, base: int, uses: int, shared: bool) -> int:
    """Return the class of a block that was used so often before."""
    which = base + strides[4] * min(3, uses)
    return int(which + strides[5]) if shared else int(which)
