"""What remote tiers hold, asked a table at a time and remembered for a moment.

Memory and disk are known to the index. A store that others write to as well is asked: one pipelined
round trip a table and tier (a few for thousands of blocks), with a deadline, under no lock of the
store. Schedulers ask for the same prompt many times in a row, so answers are kept for a second or
so, the bad ones as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvengine.compiled import Int32s
from kvengine.tiers import Tier

REMEMBER_S = 1.0
ANSWERS_MAX = 1 << 16
# A prompt that no one has seen costs one window; a long one that all have seen a few round trips.
WINDOW, GROWTH = 128, 8
NOWHERE = -1


class Finder:
    """Ask the remote ones among `tiers`, in order. Any thread may call any verb.

    `find_s` is how long one look-up may take, all tiers together.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        clock: Callable[[], float],
        find_s: float,
        remember_s: float = REMEMBER_S,
        answers_max: int = ANSWERS_MAX,
    ) -> None:
        self._tiers = [(number, tier) for number, tier in enumerate(tiers) if tier.remote]
        self._clock = clock
        self._find_s = find_s
        self._remember_s = remember_s
        self._answers_max = answers_max
        self._lock = threading.Lock()
        # (tier's number, key) → (size, until when), in order of age.
        self._answers: dict[tuple[int, bytes], tuple[int, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._tiers)

    def find(self, keys: Sequence[bytes], nbytes: Sequence[int]) -> Int32s:
        """Return the first tier that holds a frame of one of the sizes for each key.

        int32[n, 2]: the tier's number or -1, and the index of the size. Keys are those of a prompt,
        in order: they are asked for in growing windows, until one holds a key that is nowhere.
        """
        found = np.full((len(keys), 2), NOWHERE, dtype=np.int32)
        deadline = self._clock() + self._find_s
        first, step = 0, WINDOW
        while first < len(keys):
            window = found[first : first + step]
            self._ask(keys[first : first + step], nbytes, deadline, window)
            if (window[:, 0] < 0).any():
                break
            first, step = first + step, step * GROWTH
        return found

    def forget(self, keys: Sequence[bytes]) -> None:
        """Ask anew for these: a tier has been given them, or has lost them."""
        with self._lock:
            for number, _ in self._tiers:
                for key in keys:
                    self._answers.pop((number, key), None)

    def detach(self) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()

    def _ask(
        self, keys: Sequence[bytes], nbytes: Sequence[int], deadline: float, found: Int32s
    ) -> None:
        """Ask each tier for what the ones before it lack; fill `found` as `find` says."""
        for number, tier in self._tiers:
            left = np.flatnonzero(found[:, 0] < 0)
            if len(left):
                asked = [keys[index] for index in left.tolist()]
                sizes = self._sizes(number, tier, asked, deadline)
                for index, size in enumerate(nbytes):
                    found[left[sizes == size]] = (number, index)

    def _sizes(
        self, number: int, tier: Tier, keys: Sequence[bytes], deadline: float
    ) -> NDArray[np.int64]:
        now = self._clock()
        with self._lock:
            known = [self._answers.get((number, key)) for key in keys]
        sizes = [-1 if answer is None or answer[1] < now else answer[0] for answer in known]
        asked = [index for index, size in enumerate(sizes) if size < 0]
        if asked and now < deadline:
            answers = tier.find([keys[index] for index in asked], deadline)
            until = self._clock() + self._remember_s
            with self._lock:
                for index, size in zip(asked, answers, strict=True):
                    sizes[index] = size
                    if size >= 0:
                        self._answers.pop((number, keys[index]), None)  # the youngest are last
                        self._answers[number, keys[index]] = (size, until)
                excess = len(self._answers) - self._answers_max
                for oldest in list(islice(self._answers, max(0, excess))):
                    del self._answers[oldest]
        return np.array(sizes, dtype=np.int64)
