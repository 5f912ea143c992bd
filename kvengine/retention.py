"""What a caller asks for when blocks are put: how long they live, and how dear they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvengine.errors import ConfigError

PRIORITY = 50  # of blocks that nobody has said anything of
PRIORITY_MAX = 100
SECONDS_MAX = 1e9


@dataclass(frozen=True, slots=True)
class Retention:
    """How to keep blocks of one put.

    `priority` 0..100: below 50 they leave before all others, above 50 after all others, for
    `duration_s` from the put (None: as long as they are in memory). It is for the blocks that hold
    a token of first_token..last_token of the prompt (None: to its end). After `ttl_s` from the put
    the blocks of that range are misses, used or not, in memory and in tiers. Raises ConfigError for
    what cannot be.
    """

    priority: int = PRIORITY
    duration_s: float | None = None
    ttl_s: float | None = None
    first_token: int = 0
    last_token: int | None = None

    def __post_init__(self) -> None:
        if type(self.priority) is not int or not 0 <= self.priority <= PRIORITY_MAX:
            raise ConfigError(
                f"priority: given {self.priority!r}, expected an integer 0..{PRIORITY_MAX}"
            )
        check_seconds("duration_s", self.duration_s)
        check_seconds("ttl_s", self.ttl_s)
        last = math.inf if self.last_token is None else self.last_token
        if not 0 <= self.first_token < last:
            raise ConfigError(
                f"tokens: given {self.first_token}..{self.last_token}, expected a range from 0 or "
                "later that is not empty"
            )

    def blocks(self, position: int, count: int, block_tokens: int) -> slice:
        """Return which of `count` blocks from `position` on hold a token of the range."""
        first = min(count, max(0, self.first_token // block_tokens - position))
        if self.last_token is None:
            return slice(first, count)
        last = -(-self.last_token // block_tokens) - position
        return slice(first, max(first, min(count, last)))


def asked_for(
    given: Retention | Sequence[Retention], ttl_s: float | None = None
) -> list[Retention]:
    """List how to keep what is saved; `ttl_s`: what its namespace says of all."""
    asked = [given] if isinstance(given, Retention) else list(given)
    return asked if ttl_s is None else [Retention(ttl_s=ttl_s), *asked]


def check_seconds(name: str, seconds: float | None) -> None:
    """Raise ConfigError for a time that is given and is not above 0."""
    if seconds is not None and not 0 < seconds <= SECONDS_MAX:
        raise ConfigError(
            f"{name}: given {seconds!r}, expected a number of seconds above 0, up to "
            f"{SECONDS_MAX:g}, or None"
        )


def check_hint(
    session_end: bool, branch_done: bool, expect_resume_in: float | None, prefetch: bool
) -> None:
    """Raise ConfigError for a hint that contradicts itself. See `Engine.hint`."""
    check_seconds("expect_resume_in", expect_resume_in)
    resumes = expect_resume_in is not None
    if session_end + branch_done + resumes != 1 or (prefetch and not resumes):
        raise ConfigError(
            "hint: give one of session_end, branch_done and expect_resume_in; prefetch goes "
            "with the last"
        )


def check_pin(duration_s: float | None, hard: bool) -> None:
    """Raise ConfigError for a soft pin without a duration, or a hard one with one."""
    if hard != (duration_s is None) or duration_s is not None and not 0 < duration_s < 1e9:
        raise ConfigError(
            f"pin: given duration_s={duration_s} and hard={hard}, expected a number of seconds "
            "above 0 for a soft pin, and none for a hard one"
        )
