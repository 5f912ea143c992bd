"""What an engine does when its process ends or forks."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable
from typing import Protocol


class Lasting(Protocol):
    """Something with threads, files and locks of its own."""

    def close(self) -> None:
        """End, at the interpreter's exit."""
        ...

    def settle(self) -> None:
        """Be ready for a fork."""
        ...

    def detach(self) -> None:
        """Let go, in the child of a fork."""
        ...


def watch(engine: Lasting) -> Callable[[], None]:
    """Close an engine at interpreter exit, detach it in forked children. Returns the exit hook."""
    watched = weakref.ref(engine)

    def leave() -> None:
        if (found := watched()) is not None:
            found.close()

    def forks() -> None:
        if (found := watched()) is not None:
            found.settle()

    def forked() -> None:
        if (found := watched()) is not None:
            found.detach()

    atexit.register(leave)
    os.register_at_fork(before=forks, after_in_child=forked)
    return leave
