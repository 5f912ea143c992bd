"""What a caller holds of the store: a lease on blocks to read, a reservation of slots to fill.

Both have an owner and a deadline. `ids` and `parents` are the store's own names of the entries.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvengine.arena import Slots
from kvengine.compiled import Int32s
from kvengine.keys import BlockKeys

Bools = NDArray[np.bool_]


class Lease:
    """Leading blocks of a prompt, held until released or past their deadline.

    `blocks` counts those held, in memory and in tiers together; `in_memory` the leading ones that
    are in memory. `worth` names those that are sooner fetched than computed: all of them, as long
    as the engine was not told what computing takes. A context manager; `release` is idempotent and
    safe from any thread.
    """

    def __init__(
        self,
        keys: BlockKeys,
        ids: Int32s,
        in_memory: int,
        deadline: float,
        let_go: Callable[[Lease], None],
        token: bytes | None = None,
    ) -> None:
        self.keys = keys
        self.blocks = len(ids)
        self.in_memory = in_memory
        self.worth = range(len(ids))
        self.deadline = deadline
        self.token = token or os.urandom(16)
        self.ids = ids
        self._let_go = let_go

    def __len__(self) -> int:
        return self.blocks

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the blocks go. Transfers that still use them keep their own hold."""
        self._let_go(self)


class Reservation:
    """Slots for blocks that the caller is about to fill.

    `indices` says which keys of the table are reserved, `held` which are held already (the others
    were refused, or someone else fills them now), `slots` where in the arena. Ends by
    `Store.commit` or `Store.abort`, at once; or at its deadline, when the keys are free for others,
    and the slots stay quarantined until this object says that nobody writes them any more (commit,
    abort, or its end). `fill` is what all frames of one fill carry: that of a group, where several
    ranks fill a block together, each its parts; such a block is void at once when this object ends.
    """

    def __init__(
        self,
        keys: BlockKeys,
        number: int,
        ids: Int32s,
        indices: NDArray[np.intp],
        held: Bools,
        slots: Slots,
        parents: Int32s,
        deadline: float,
        dead: deque[bytes],
        fill: bytes | None = None,
        token: bytes | None = None,
    ) -> None:
        self.keys = keys
        self.number = number  # of the form that its slots are for
        self.indices = indices
        self.held = held
        self.slots = slots
        self.deadline = deadline
        drawn = os.urandom(32)
        self.fill, self.token = fill or drawn[:16], token or drawn[16:]
        self.ids = ids
        self.parents = parents
        self._dead = dead

    def __del__(self) -> None:
        self._dead.append(self.token)

    def __len__(self) -> int:
        return len(self.slots)
