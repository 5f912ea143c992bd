"""When a tier is left alone: a state machine of (what happened, now), for whoever owns a tier.

    closed ──failures_max failures in a row──▶ open ──pause_s over──▶ trying
      ▲                                          ▲                      │
      └───────────────── succeeded ──────────────┼──────────────────────┤
                                                 └──failed: pause doubles

While it is not closed, no one's request is sent: the owner makes the trial by itself (a ping, a
small read), so that no request waits for a tier that may still be away. Reads no clock and locks
nothing: its owner guards it.
"""

from __future__ import annotations

FAILURES_MAX = 3
PAUSE_S = 0.25
PAUSE_S_MAX = 30.0


class Breaker:
    """Closed: requests go through. After failures in a row it opens, and one trial at a time may
    close it again."""

    def __init__(
        self,
        failures_max: int = FAILURES_MAX,
        pause_s: float = PAUSE_S,
        pause_s_max: float = PAUSE_S_MAX,
    ) -> None:
        assert failures_max >= 1
        assert 0 < pause_s <= pause_s_max
        self._failures_max = failures_max
        self._pause_s = self._first_pause_s = pause_s
        self._pause_s_max = pause_s_max
        self._failures = 0
        self._until: float | None = None  # None: closed

    @property
    def closed(self) -> bool:
        """Whether requests go through."""
        return self._until is None

    def failed(self, now: float) -> bool:
        """Note a failed request. Returns whether it has opened the breaker."""
        self._failures += 1
        if self._until is not None or self._failures < self._failures_max:
            return False  # one that was under way when it opened says nothing new
        self._until = now + self._pause_s
        return True

    def succeeded(self) -> None:
        """Note a request, or a trial, that went well: closed from now on."""
        self._failures = 0
        self._pause_s = self._first_pause_s
        self._until = None

    def trial(self, now: float) -> bool:
        """Say whether to make a trial now: once a pause, each pause twice as long as the last.

        The next one is due a pause later even where this one is never heard of again.
        """
        if self._until is None or now < self._until:
            return False
        self._pause_s = min(2 * self._pause_s, self._pause_s_max)
        self._until = now + self._pause_s
        return True
