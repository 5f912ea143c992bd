"""Policies by the names that the `policy` setting knows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvengine import compiled
from kvengine.policy import Policy, UnknownPolicy
from kvengine.policy.adaptive import Adaptive
from kvengine.policy.arc import ARC
from kvengine.policy.lru import LRU
from kvengine.policy.s3fifo import S3FIFO
from kvengine.policy.ttl import TTL
from kvengine.policy.windowed import WindowedLRU

POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        "adaptive": Adaptive,
        "lru": LRU,
        "windowed-lru": WindowedLRU,
        "ttl": TTL,
        "arc": ARC,
        "s3fifo": S3FIFO,
    }
)


def check_name(name: object) -> str:
    """Return the name of a policy as it is. Raises UnknownPolicy, with the nearest that is."""
    if not isinstance(name, str) or name not in POLICIES:
        near = difflib.get_close_matches(str(name), POLICIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownPolicy(f"given {name!r}, {hint}expected one of {', '.join(POLICIES)}")
    return name


def policy_of(name: str) -> Policy:
    """Make a policy by its name.

    `adaptive` learns in loops that are too slow in plain Python: without numba (extra `[cpu]`) it
    is `lru`. Raises UnknownPolicy.
    """
    check_name(name)
    if name == "adaptive" and not compiled.NATIVE:
        return LRU()
    return POLICIES[name]()
