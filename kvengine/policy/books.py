"""The columns of the `adaptive` policy, in one tuple that its loops share.

Classes: what is known of a request (how long its output was, how long its chain had slept, how it
stopped, how much of its prompt was new) and of a block in it (how often it was used, whether other
prompts go through it) makes a small number. All that is learned is learned of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import NATIVE, Int32s, Int64s
from kvengine.policy import UnknownPolicy

Floats = NDArray[np.float64]
Column = TypeVar("Column", Int32s, Int64s, Floats)

# Feature and its number of levels. The last two belong to the block, the others to the request.
FEATURES = (("output", 3), ("gap", 7), ("stop", 3), ("new", 5), ("uses", 4), ("shared", 2))
OUTPUT, GAP, STOP, NEW, USES, SHARED = 0, 1, 2, 3, 4, 5
LEVELS_MAX = 7
# Ages in bins, two an octave, from a second on.
BINS = 40
TICKS_A_SECOND = 16

# Records of blocks seen, resident or not: the records 0..classes-1 are the ends of the shadow's
# queues, the next one the end of the list of all by last use. IN_LRU, IN_OWN: in that shadow cache.
CHAIN, PREV, NEXT, CLASS, LAST, COUNT, FLAGS, BEFORE, AFTER, CHILD = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
# ABOVE: the record of the block before it that is sampled; UNDER: how many such are in the shadow.
ABOVE, UNDER = 10, 11
RECORD_WIDTH = 12
IN_LRU, IN_OWN, FORK, WAITS = 1, 2, 4, 8

# Numbers of the books.
TICK, CAPACITY, RESIDENT, SAMPLE_MASK, RECORDS, LRU_SIZE, OWN_SIZE, EDGE = 0, 1, 2, 3, 4, 5, 6, 7
FOLLOW, REQUESTS, LEARN_AT, EPOCH, CLASSES, GUARDED, BASE, SAMPLED = 8, 9, 10, 11, 12, 13, 14, 15
FORK_AT, GROWN, KNOWN = 16, 17, 18
NUMBERS = 19


class Books(NamedTuple):
    """All columns, flat. `numbers` holds the scalars above."""

    nodes: Int32s
    used: Int32s
    records: Int32s
    prints: Int64s
    buckets: Int32s
    shadow_used: Int32s
    numbers: Int64s
    found: Int32s  # of the request at hand: each block's record, -1 not seen, -2 not sampled
    strides: Int64s
    events: Floats  # [class, bin]: uses that came back at that age
    censored: Floats  # [class, bin]: uses lost sight of at that age
    risk: Floats  # [class, bin]: uses that have reached that age
    hazard: Floats  # [bin]: of all classes together
    ratios: Floats  # [feature, level, bin]: of a level to all
    ranks: Int64s  # [class, bin]: the index, as an ordered number
    epochs: Int64s  # [class]: when its ranks were made
    edges: Floats  # [bin + 1]: in seconds
    balance: Floats  # the guard's: decayed hits of ours less those of LRU, and of how many
    work: Floats  # room for what is fitted: (2 * levels + 4) rows of bins
    heads: Int64s  # the tournament: keys, classes, and where a class stands
    players: Int32s
    places: Int32s


def strides_of(features: Sequence[str]) -> tuple[Int64s, int]:
    """Return what a level of each feature adds to the class (0: not used), and the classes."""
    unknown = set(features) - {name for name, _ in FEATURES}
    if unknown:
        known = ", ".join(name for name, _ in FEATURES)
        raise UnknownPolicy(f"features: given {sorted(unknown)}, expected some of {known}")
    strides, classes = np.zeros(len(FEATURES), dtype=np.int64), 1
    for number, (name, levels) in enumerate(FEATURES):
        if name in features:
            strides[number] = classes
            classes *= levels
    return strides, classes


def fast(array: Column) -> Column:
    """Return a column in the form that the loops read fastest (as `compiled.column`)."""
    return array if NATIVE else cast(Column, array.data)


def new_books(strides: Int64s, classes: int, records: int) -> Books:
    """Make empty books for so many classes, and for a request of `records` blocks."""
    width = RECORD_WIDTH * (classes + 1)
    made = Books(
        nodes=np.zeros(0, dtype=np.int32),
        used=np.zeros(0, dtype=np.int32),
        records=np.zeros(width, dtype=np.int32),
        prints=np.zeros(classes + 1, dtype=np.int64),
        buckets=np.full(2 * records, -1, dtype=np.int32),
        shadow_used=np.zeros(classes, dtype=np.int32),
        numbers=np.zeros(NUMBERS, dtype=np.int64),
        found=np.zeros(records, dtype=np.int32),
        strides=strides,
        events=np.zeros(classes * BINS),
        censored=np.zeros(classes * BINS),
        risk=np.zeros(classes * BINS),
        hazard=np.zeros(BINS),
        ratios=np.ones(len(FEATURES) * LEVELS_MAX * BINS),
        ranks=np.zeros(classes * BINS, dtype=np.int64),
        epochs=np.zeros(classes, dtype=np.int64),
        edges=np.concatenate([[0.0], 2.0 ** (np.arange(BINS) / 2)]),
        balance=np.zeros(2),
        work=np.zeros((2 * LEVELS_MAX + 4) * BINS),
        heads=np.zeros(classes, dtype=np.int64),
        players=np.zeros(classes, dtype=np.int32),
        places=np.zeros(classes, dtype=np.int32),
    )
    ends = np.arange(classes + 1, dtype=np.int32)
    for end in (PREV, NEXT, BEFORE, AFTER):
        made.records[end::RECORD_WIDTH] = ends
    made.records[CHAIN::RECORD_WIDTH] = -1
    made.numbers[CLASSES], made.numbers[EDGE] = classes, classes
    return made
