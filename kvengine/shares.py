"""How much of a host's memory each tenant may hold, and how often it may ask. Pure.

Memory is shared max-min fair by weight: what a tenant has reserved is its own as far as it wants
it, the rest goes round by weight until nobody wants more or nothing is left. So an idle tenant's
memory is lent, and comes back to it from whoever is furthest over their share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BURST_S = 2.0  # what a rate lets through at once, after a pause


class Want(NamedTuple):
    """What one tenant holds and asks for (`want_bytes`, together), and what it is promised."""

    want_bytes: int
    reserved_bytes: int = 0
    maximum_bytes: int | None = None
    weight: float = 1.0

    @property
    def most_bytes(self) -> int:
        """What it would take if there were enough."""
        most = self.maximum_bytes
        return self.want_bytes if most is None else min(self.want_bytes, most)


def shares(total_bytes: int, wants: Mapping[str, Want]) -> dict[str, int]:
    """Return how many bytes each tenant may hold; together at most `total_bytes`.

    Where more is reserved than there is, reservations shrink in proportion.
    """
    caps = {name: want.most_bytes for name, want in wants.items()}
    reserved = sum(want.reserved_bytes for want in wants.values())
    scale = min(1.0, total_bytes / reserved) if reserved else 1.0
    given = {
        name: min(caps[name], int(want.reserved_bytes * scale)) for name, want in wants.items()
    }
    left = total_bytes - sum(given.values())
    open_ = {name for name in wants if given[name] < caps[name]}
    while open_ and left > 0:
        weights = sum(wants[name].weight for name in open_)
        level = {name: int(left * wants[name].weight / weights) for name in open_}
        full = {name for name in open_ if caps[name] - given[name] <= level[name]}
        for name in full or open_:
            step = caps[name] - given[name] if full else level[name]
            given[name] += step
            left -= step
        if not full:
            break
        open_ -= full
    return given


class Limits:
    """How much one tenant may ask for; nothing is limited until `set`. Any thread may call."""

    def __init__(self) -> None:
        self._rates: tuple[Rate | None, Rate | None] = (None, None)

    def set(self, lookups_per_s: float | None, saved_bytes_per_s: float | None) -> None:
        """Change the rates; None: no limit. A rate that stays keeps what is owed."""
        asked = (lookups_per_s, saved_bytes_per_s)
        self._rates = (
            _same(self._rates[0], asked[0]),
            _same(self._rates[1], asked[1]),
        )

    def allows(self, lookups: int, saved_bytes: int, now: float) -> bool:
        """Say whether so many keys may be looked up, or bytes reserved, now; count them if so."""
        for rate, units in zip(self._rates, (lookups, saved_bytes), strict=True):
            if rate is not None and units and not rate.allows(units, now):
                return False
        return True


def _same(rate: Rate | None, per_s: float | None) -> Rate | None:
    if per_s is None:
        return None
    return rate if rate is not None and rate.per_s == per_s else Rate(per_s)


class Rate:
    """Let through so many units a second on average, BURST_S of them at once after a pause.

    One request may be larger than that: it is let through where nothing is owed, and paid off. The
    time comes in with each call.
    """

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._owed = 0.0
        self._then = 0.0

    def allows(self, units: float, now: float) -> bool:
        """Say whether so many units may pass now, and count them if so."""
        self._owed = max(0.0, self._owed - (now - self._then) * self.per_s)
        self._then = now
        if self._owed and self._owed + units > self.per_s * BURST_S:
            return False
        self._owed += units
        return True
