"""What the `adaptive` policy learns: how likely a block of a class is used again at each age.

For each class and bin of ages, uses that came back there over uses that got there (Kaplan and
Meier, 1958: what is lost sight of counts as long as it was seen). Few classes see enough for that,
so the hazard of a class is shrunk to a product: that of all, times one ratio for each level of each
feature, fitted in turns (iterative proportional fitting). From the hazards follows the index of a
block of a class and an age: the best rate of hits per second of memory over all horizons
(Gittins, 1979). The block with the lowest index is worth the least.
"""

from __future__ import annotations

import math

from kvengine.compiled import compiled
from kvengine.policy.books import Books, Floats

PRIOR_REQUESTS = 60
RATIO_PRIOR_REQUESTS = 20
TURNS = 2
LEARN_FIRST, LEARN_MAX = 32, 1024


@compiled
def bin_of(age: int) -> int:
    if age < 16:
        return 0
    return min(39, 1 + int(2.0 * math.log2(age / 16.0)))


@compiled
def levels_of(feature: int) -> int:
    if feature == 0 or feature == 2:
        return 3
    if feature == 1:
        return 7
    if feature == 3:
        return 5
    return 4 if feature == 4 else 2


@compiled
def _count_risk(books: Books, classes: int) -> None:
    for at in range(classes * 40):
        books.risk[at] = books.events[at] + books.censored[at]
    records, risk, end = books.records, books.risk, classes
    record = int(records[end * 12 + 2])
    while record != end:
        age = int(books.numbers[0] - records[record * 12 + 4])
        risk[records[record * 12 + 3] * 40 + bin_of(age)] += 1.0
        record = int(records[record * 12 + 2])
    for which in range(classes):
        beyond = 0.0
        for k in range(39, -1, -1):
            here = books.risk[which * 40 + k]
            gone = here - books.events[which * 40 + k]  # seen for half of the bin, say
            books.risk[which * 40 + k] = beyond + here - 0.5 * gone
            beyond += here


@compiled
def _fit_all(books: Books, classes: int, prior: float) -> None:
    before = 0.5
    for k in range(40):
        events, risk = 0.0, 0.0
        for which in range(classes):
            events += books.events[which * 40 + k]
            risk += books.risk[which * 40 + k]
        before = min(0.95, (events + prior * 0.7 * before) / (risk + prior))
        books.hazard[k] = before


@compiled
def _products(books: Books, which: int, out: Floats) -> None:
    # The hazard that a class has by its features alone, at each age.
    ratios, strides = books.ratios, books.strides
    for k in range(40):
        out[k] = books.hazard[k]
    for feature in range(6):
        if strides[feature] > 0:
            level = which // strides[feature] % levels_of(feature)
            for k in range(40):
                out[k] *= ratios[(feature * 7 + level) * 40 + k]
    for k in range(40):
        out[k] = min(0.95, out[k])


@compiled
def _fit_feature(books: Books, feature: int, classes: int, prior: float) -> None:
    # The sums: [level, bin] events seen, then events expected, then a class's hazards.
    sums = books.work
    events, all_risk, product = books.events, books.risk, sums[2 * 7 * 40 : 2 * 7 * 40 + 40]
    levels = levels_of(feature)
    for at in range(2 * 7 * 40):
        sums[at] = 0.0
    for which in range(classes):
        if all_risk[which * 40] <= 0.0:
            continue
        level = which // books.strides[feature] % levels
        _products(books, which, product)
        for k in range(40):
            risk = all_risk[which * 40 + k]
            if risk <= 0.0:
                break
            sums[level * 40 + k] += events[which * 40 + k]
            sums[(7 + level) * 40 + k] += risk * product[k]
    for level in range(levels):
        for k in range(40):
            seen, expected = 0.0, 0.0
            for near in range(max(0, k - 1), min(40, k + 2)):
                weight = 1.0 if near == k else 0.5
                seen += weight * sums[level * 40 + near]
                expected += weight * sums[(7 + level) * 40 + near]
            books.ratios[(feature * 7 + level) * 40 + k] *= (seen + prior) / (expected + prior)


@compiled
def learn(books: Books) -> None:
    """Fit all hazards to what was seen; ranks are made again as they are asked for."""
    classes = int(books.numbers[12])
    requests = max(1, books.numbers[9])
    blocks = max(1.0, books.numbers[15] / requests)  # sampled blocks a request
    _count_risk(books, classes)
    _fit_all(books, classes, 0.1 * blocks)
    for at in range(6 * 7 * 40):
        books.ratios[at] = 1.0
    for _ in range(2):
        for feature in range(6):
            if books.strides[feature] > 0:
                _fit_feature(books, feature, classes, 20.0 * blocks)
    books.numbers[11] += 1


@compiled
def _rank(books: Books, which: int) -> None:
    requests = max(1, books.numbers[9])
    prior = 60.0 * max(1.0, books.numbers[15] / requests)
    work = books.work
    survival, mass, product = work[0:41], work[80:120], work[120:160]
    edges, ranks = books.edges, books.ranks
    _products(books, which, product)
    survival[0] = 1.0
    for k in range(40):
        seen = books.events[which * 40 + k]
        hazard = (seen + prior * product[k]) / (books.risk[which * 40 + k] + prior)
        mass[k] = min(1.0, hazard) * survival[k]
        survival[k + 1] = max(1e-6, survival[k] - mass[k])
    for age in range(40):
        best, hits, cost = 1e-12, 0.0, 0.0
        for k in range(age, 40):
            hits += mass[k]
            cost += (survival[k] + survival[k + 1]) * 0.5 * (edges[k + 1] - edges[k])
            if hits > best * cost:
                best = hits / cost
        ranks[which * 40 + age] = int((math.log2(best) + 64.0) * 1048576.0)
    books.epochs[which] = books.numbers[11]


@compiled
def key_of(books: Books, lru: int, which: int, last: int) -> int:
    """Return the worth of a block of a class by its last use: the least is evicted first."""
    if lru != 0 or books.numbers[11] == 0:
        return last
    if books.epochs[which] != books.numbers[11]:
        _rank(books, which)
    age = books.numbers[0] - last
    return int(books.ranks[which * 40 + bin_of(age)]) * 4294967296 + last
