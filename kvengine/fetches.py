"""What is on its way from tiers into memory: a bounded share of it, each block once, with alarms.

A one-shot read of much would otherwise take all of memory from what is used again and again, and
two requests for one prompt would read it twice. Loads and prefetches share one `Fetches`.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

from kvengine.compiled import Int32s
from kvengine.lease import Bools

# Called once: True when it is one's turn, False where the deadline came first.
Start = Callable[[bool], None]
Ready = Callable[[], None]


class Turn(NamedTuple):
    """Who waits for memory."""

    nbytes: int
    deadline: float
    start: Start


class Fetches:
    """Turns, claims and alarms of an engine's fetches. Any thread may call any verb.

    `share_bytes` of memory are lent to reads at a time; one read is always let in. Callbacks are
    made without a lock, in the thread that has made way for them.
    """

    def __init__(
        self,
        share_bytes: int,
        clock: Callable[[], float],
        on_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.share_bytes = share_bytes
        self._on_error = on_error
        self._clock = clock
        self._lock = threading.Lock()
        self._lent = 0
        self._turns: deque[Turn] = deque()
        self._letting_in = False
        self._flying: dict[int, list[Join]] = {}
        self._alarms: list[Alarm] = []
        self._number = count()
        self._ringing = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    # Turns

    def begin(self, nbytes: int, deadline: float, start: Start) -> None:
        """Call `start` when so many bytes may be lent, at once if that is now, or if closed."""
        with self._lock:
            closed = self._closed
            if not closed:
                if self._turns or self._lent and self._lent + nbytes > self.share_bytes:
                    self._turns.append(Turn(nbytes, deadline, start))
                    return
                self._lent += nbytes
        start(not closed)

    def end(self, nbytes: int) -> None:
        """Give bytes back, and let those in whose turn it is now."""
        with self._lock:
            self._lent -= nbytes
        self._let_in()

    def _let_in(self) -> None:
        """Begin turns while there is memory for them, one thread at a time.

        One that ends at once calls back in here: it finds somebody at it, who looks again.
        """
        with self._lock:
            if self._letting_in:
                return
            self._letting_in = True
        try:
            while (turn := self._next_turn()) is not None:
                turn[0].start(turn[1])
        except BaseException:
            with self._lock:
                self._letting_in = False
            raise

    def _next_turn(self) -> tuple[Turn, bool] | None:
        """Return whose turn it is, and whether in time. None, and nobody is at it: no one's."""
        with self._lock:
            if self._turns:
                turn = self._turns[0]
                in_time = self._clock() < turn.deadline
                room = not self._lent or self._lent + turn.nbytes <= self.share_bytes
                if room or not in_time:
                    self._turns.popleft()
                    self._lent += turn.nbytes if in_time else 0
                    return turn, in_time
            self._letting_in = False
            return None

    # Claims

    def claim(self, ids: Int32s) -> Bools:
        """Say which blocks nobody fetches: those are the caller's now, until `free`."""
        with self._lock:
            mine = np.array([id not in self._flying for id in ids.tolist()], dtype=np.bool_)
            twice = np.ones(len(ids), dtype=np.bool_)
            twice[np.unique(ids, return_index=True)[1]] = False
            mine &= ~twice
            for id in ids[mine].tolist():
                self._flying[id] = []
            return mine

    def join(self, ids: Int32s, ready: Ready) -> None:
        """Call `ready` once none of these blocks is being fetched any more."""
        with self._lock:
            flying = {id for id in ids.tolist() if id in self._flying}
            join = Join(len(flying), ready)
            for id in flying:
                self._flying[id].append(join)
        if not flying:
            ready()

    def free(self, ids: Int32s) -> None:
        """Give claims up: the blocks are in memory, or will not be."""
        done = []
        with self._lock:
            for id in ids.tolist():
                for join in self._flying.pop(id, ()):
                    join.left -= 1
                    if not join.left:
                        done.append(join)
        for join in done:
            join.ready()

    # Alarms

    def alarm(self, when: float, ring: Ready) -> Alarm:
        """Call `ring` at a time of the clock, from a thread of ours, unless cancelled before."""
        with self._lock:
            made = Alarm(when, next(self._number), ring)
            if self._closed:
                return made
            heapq.heappush(self._alarms, made)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvengine-deadlines", daemon=True
                )
                self._thread.start()
            elif self._alarms[0] is made:
                self._ringing.notify()
            return made

    def ring(self) -> float | None:
        """Call what is due; returns when the next is, None for never."""
        while True:
            with self._lock:
                while self._alarms and self._alarms[0].ring is None:
                    heapq.heappop(self._alarms)
                if not self._alarms or self._alarms[0].when > self._clock():
                    when = self._alarms[0].when if self._alarms else None
                    break
                ring = heapq.heappop(self._alarms).ring
            if ring is not None:
                ring()
        self._let_in()  # turns that have come too late are told so
        return when

    def _run(self) -> None:
        while not self._closed:
            self._tell(self.ring)
            with self._ringing:
                if not self._closed:  # an alarm may have come since
                    when = self._alarms[0].when if self._alarms else None
                    self._ringing.wait(None if when is None else max(0.0, when - self._clock()))

    def close(self) -> None:
        """End the thread. Whoever still waits for a turn or a deadline is told that it is over."""
        with self._ringing:
            self._closed = True
            self._ringing.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            late = [alarm.ring for alarm in sorted(self._alarms)]
            turns = [turn.start for turn in self._turns]
            self._alarms, self._turns = [], deque()
        for ring in late:
            if ring is not None:
                self._tell(ring)
        for start in turns:
            self._tell(partial(start, False))

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # the thread's loop goes on: others are to be told as well
            self._on_error(error)

    def detach(self) -> None:
        """After a fork, in the child: nothing is under way here."""
        self._lock = threading.Lock()
        self._ringing = threading.Condition(self._lock)
        self._letting_in = False
        self._closed = True


class Alarm:
    """Something to be called at a time. `cancel` lets go of it."""

    __slots__ = ("when", "number", "ring")

    def __init__(self, when: float, number: int, ring: Ready) -> None:
        self.when = when
        self.number = number
        self.ring: Ready | None = ring

    def __lt__(self, other: Alarm) -> bool:
        return (self.when, self.number) < (other.when, other.number)

    def cancel(self) -> None:
        """Do not ring."""
        self.ring = None


class Once:
    """Calls something the first time that it is called. Safe from any thread."""

    __slots__ = ("_left",)

    def __init__(self, call: Ready) -> None:
        self._left = [call]

    def __call__(self) -> None:
        try:
            call = self._left.pop()
        except IndexError:
            return
        call()


class Join:
    """Someone who waits for blocks that others fetch."""

    __slots__ = ("left", "ready")

    def __init__(self, left: int, ready: Ready) -> None:
        self.left = left
        self.ready = ready
