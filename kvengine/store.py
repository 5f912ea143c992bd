"""Blocks held by this node: reserve → fill → commit, match → use → release.

One lock, held for index work only: bytes are copied, encoded, read and sent by others, in slots
that the store has lent them. Nobody sees an uncommitted block, nobody loses a leased one, and a
slot that someone may still write is quarantined until its owner has said so, never reused on a
deadline alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvengine.arena import Arena, Slots
from kvengine.codec import Codec, Forms, forms_of
from kvengine.compiled import Int32s, Int64s
from kvengine.errors import LayoutError
from kvengine.fills import Fills, Settled
from kvengine.forms import Form, form_of
from kvengine.frame import EXPIRES, PAGE_BYTES, expires_of
from kvengine.frame import NEVER as NO_EXPIRY
from kvengine.index import (
    COMMITTED,
    DOOMED,
    FILLING,
    LEASES,
    NAMESPACE,
    NO_SLOT,
    ROWS_MIN,
    SLOT,
    STATE,
    STATE_MASK,
    TIER_SHIFT,
    Index,
)
from kvengine.keys import KEY_BYTES, ROOT_KEY, BlockKeys, Identity, Namespace
from kvengine.layout import Layout
from kvengine.lease import Bools, Lease, Reservation
from kvengine.metrics import Metrics
from kvengine.policy import NO_PARENT, Policy, Request, Run
from kvengine.policy.retention import NEVER, USUAL, Retained
from kvengine.retention import Retention
from kvengine.tiers import Held, Span, Tier
from kvengine.transient import Transients

EMPTY = np.empty(0, dtype=np.int32)
UNKNOWN = -1
ROOM_TABLES = 8
STATS_ROWS = 1 << 15
LOOPS_MAX = 128  # more than index and policy have
WIDE_MAX = 1 << 16
TRANSIENT_SHARE = 4  # a quarter of memory for what is fetched, until it is asked for again


FORM_BITS = 1  # a namespace has two numbers: its frames are of up to two sizes


@dataclass(slots=True)
class Space:
    """What the store knows of frames of one size of a namespace. 0 bytes: none are known."""

    digest: bytes
    nbytes: int


class Store:
    """See the module. All verbs may be called from any thread.

    `clock` gives seconds; `lease_s` and `reservation_s` are how long a dead owner is waited for.
    """

    def __init__(
        self,
        arena: Arena,
        policy: Policy,
        metrics: Metrics,
        clock: Callable[[], float],
        lease_s: float = 60.0,
        reservation_s: float = 60.0,
    ) -> None:
        self.arena = arena
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._lease_s = lease_s
        self._reservation_s = reservation_s
        self._lock = threading.Lock()
        self._clean = threading.Condition(self._lock)
        self._index = Index()
        self._tiers: list[Tier] = []
        self._spaces: list[Space] = []
        self._forms: dict[int, Forms[Form]] = {}
        self._numbers: dict[bytes, int] = {}
        self._leases: dict[bytes, Lease] = {}
        self._reservations: dict[bytes, Reservation] = {}
        self._quarantine: dict[bytes, tuple[int, Slots]] = {}
        self._fills = Fills(lambda ids: [key.tobytes() for key in self._index.keys(ids)])
        self._joined: dict[bytes, tuple[Int32s, int]] = {}  # reservations of parts: ids, parts
        self._wide: dict[bytes, None] = {}  # keys whose parts take the spare form
        self._remote_bits = 0
        self._dirty: list[deque[Int32s]] = []  # one for each tier
        self._waiting_bytes: list[int] = []
        self._windows: set[int] = set()  # namespaces of which the middle may go
        self._spared: dict[int, int] = {}  # bits of the tiers that a namespace is not written to
        self._unwritten = 0  # over all tiers
        self._lent_pages = 0
        self._transients = Transients()
        self._dead: deque[bytes] = deque()
        self._outlived: list[bytes] = []  # keys that tiers are to drop

    # Namespaces and tiers

    def namespace(
        self, identity: Identity, layout: Layout, secret: bytes, forms: Forms[Codec] | None = None
    ) -> Namespace:
        """Return the namespace of an identity; the same number for the same identity.

        forms: its codecs, those of the identity's fidelity if None.
        """
        if identity.layout != layout.digest():
            raise LayoutError("the identity names another layout than the one given")
        digest = identity.digest()
        forms = forms or forms_of(identity.fidelity, layout)
        assert forms.usual.fidelity == identity.fidelity
        # The numbers are drawn under the lock.
        made = {each: form_of(layout, digest, each, UNKNOWN) for each in forms}
        sizes = {form.nbytes for form in made.values()}
        nbytes = max(sizes)
        if nbytes > self.arena.nbytes:
            raise LayoutError(
                f"one block of this layout takes {nbytes} bytes, the arena has "
                f"{self.arena.nbytes}: open the engine with more memory or use smaller blocks"
            )
        assert len(sizes) <= 1 << FORM_BITS
        with self._lock:
            numbers = {size: self._number(digest, size, keep=sizes) for size in sizes}
            drawn = forms.map(lambda each: replace(made[each], number=numbers[made[each].nbytes]))
            number = drawn.usual.number
            self._forms.setdefault(number, drawn)
        return Namespace(identity, layout, number, digest, identity.root(secret))

    def knows(self, namespace: Namespace) -> bool:
        """Say whether a namespace was made by this store: numbers of others mean other sizes."""
        number = namespace.number
        return number in self._forms and self._spaces[number].digest == namespace.digest

    def frame_bytes(self, number: int) -> int:
        """Return the size of a form's frames."""
        return self._spaces[number].nbytes

    def forms(self, namespace: Namespace) -> Forms[Form]:
        """Return what a namespace's blocks are saved as."""
        return self._forms[namespace.number]

    def form(self, namespace: Namespace, number: int) -> Form:
        """Return the form of that number; the usual one where none has it."""
        forms = self._forms[namespace.number]
        return next((form for form in forms if form.number == number), forms.usual)

    def attach(self, tier: Tier) -> int:
        """Take in a tier and the blocks that it holds. Returns how many."""
        with self._lock:
            number = len(self._tiers)
            self._tiers.append(tier)
            self._dirty.append(deque())
            self._waiting_bytes.append(0)
            if tier.remote:
                self._remote_bits |= 1 << number
            return sum(self._adopt(number, held) for held in tier.scan())

    def spare(self, number: int, bits: int) -> None:
        """Name the tiers that a namespace is not written to: computing its blocks is faster."""
        with self._lock:
            self._spared[number >> FORM_BITS] = bits

    def dropped(self, tier: int, keys: Sequence[bytes]) -> None:
        """Note that a tier has given keys up by itself."""
        with self._lock:
            ids = np.unique(self._index.find(_words(keys)))
            ids = ids[ids >= 0]
            self._index.remove_tier(ids, tier)
            rows = self._index.rows[ids]
            nowhere = (rows[:, SLOT] == NO_SLOT) & (rows[:, STATE] == COMMITTED)
            self._forget(ids[nowhere])

    # match → use → release

    def probe(self, keys: BlockKeys) -> int:
        """Count the leading blocks that are held. Takes nothing, leaves recency alone."""
        with self._lock:
            return len(self._prefix(keys)[0])

    def contains(self, keys: BlockKeys) -> Bools:
        """Say for each key whether its block is held. Takes nothing, leaves recency alone."""
        with self._lock:
            ids = self._index.find(keys.words)
            return self._present(ids, keys.namespace.number, self._reachable())[0]

    def match(
        self, keys: BlockKeys, found: Int32s | None = None, request: Request | None = None
    ) -> Lease:
        """Hold the leading blocks that are here or in a tier; the lease says how many.

        `request` tells the policy what is known of it.

        `found`: int32[n, 2], the number of the remote tier that has said to hold each key's block
        or -1, and the number of the form that it holds.
        """
        now = self._clock()
        with self._lock:
            self._sweep(now)
            entered = EMPTY if found is None else self._take_in(keys, found)
            ids, in_memory = self._prefix(keys)
            if self._outlive(ids):
                ids, in_memory = self._prefix(keys)
            self._policy.held(self._index.lease(ids))
            if len(entered):
                # Beyond a block that is being filled now: nobody leases them.
                self._discard(entered[~np.isin(entered, ids)])
            prints, tokens = keys.prints, keys.namespace.layout.block_tokens
            request = Request(block_tokens=tokens) if request is None else request
            run = Run(ids[:in_memory], NO_PARENT, keys.position, 0, prints, request)
            self._policy.touched(run, now)
            self._transients.remove(ids)
            lease = Lease(keys, ids, in_memory, now + self._lease_s, self.release)
            if len(ids):
                self._leases[lease.token] = lease
        self._drop_outlived()
        return lease

    def release(self, lease: Lease) -> None:
        """Let a lease's blocks go; idempotent."""
        with self._lock:
            if self._leases.pop(lease.token, None) is not None:
                self._unlease(lease.ids)

    def share(self, lease: Lease) -> Lease:
        """Lease the blocks of a lease once more, for another owner; none where it has ended."""
        with self._lock:
            ids = lease.ids if lease.token in self._leases else EMPTY
            self._index.lease(ids)
            deadline = self._clock() + self._lease_s
            made = Lease(lease.keys, ids, min(lease.in_memory, len(ids)), deadline, self.release)
            if len(ids):
                self._leases[made.token] = made
        return made

    def pin(self, lease: Lease, first: int, count: int) -> tuple[Int32s, Slots, Int32s]:
        """Hold blocks of a live lease for a transfer.

        Returns their ids, slots (NO_SLOT: in a tier) and numbers of forms; empty where the lease
        has ended. `unpin` gives them back.
        """
        with self._lock:
            if lease.token not in self._leases:
                return EMPTY, EMPTY, EMPTY
            ids = lease.ids[first : first + count]
            self._index.lease(ids)
            rows = self._index.rows[ids]
            return ids, rows[:, SLOT], rows[:, NAMESPACE]

    def repin(self, ids: Int32s) -> None:
        """Hold pinned blocks once more."""
        with self._lock:
            self._index.lease(ids)

    def slots(self, ids: Int32s) -> Slots:
        """Return where pinned blocks lie now, NO_SLOT for those that are not in memory."""
        with self._lock:
            slots: Slots = self._index.rows[ids, SLOT]
            return slots

    def still(self, ids: Int32s) -> Bools:
        """Say of pinned blocks which have lain in their slots all the time: all of them."""
        return np.ones(len(ids), dtype=np.bool_)

    def places(self, ids: Int32s) -> tuple[Slots, Int32s]:
        """Return where held blocks lie now, as `slots` does, and the numbers of their forms."""
        with self._lock:
            rows = self._index.rows[ids]
            return rows[:, SLOT].copy(), rows[:, NAMESPACE].copy()

    def unpin(self, ids: Int32s) -> None:
        """Give back what `pin` held."""
        with self._lock:
            self._unlease(ids)

    def homes(self, ids: Int32s, below: int = -1) -> Int32s:
        """Return the number of the fastest tier after `below` that holds each, or -1."""
        with self._lock:
            return _lowest(self._index.tiers(ids) >> (below + 1), below + 1)

    def served(self, ids: Int32s) -> Int32s:
        """Return the number of the tier that each would be read from, -1 for memory."""
        with self._lock:
            away = self._index.rows[ids, SLOT] == NO_SLOT
            return _lowest(np.where(away, self._index.tiers(ids), 0), 0)

    def retaining(self) -> Retained:
        """Have the policy heed what callers ask for, of blocks that come from now on."""
        if not isinstance(self._policy, Retained):
            exercise(Retained)  # not under the lock: loops may have to be compiled
        with self._lock:
            if not isinstance(self._policy, Retained):
                self._policy = Retained(self._policy)
            return self._policy

    def retain(self, keys: BlockKeys, tell: Callable[[Retained, Int32s, float], int]) -> int:
        """Tell the policy, under the lock, what is asked for blocks; -1: not in memory."""
        policy, now = self.retaining(), self._clock()
        with self._lock:
            ids = self._index.find(keys.words)
            in_memory = self._present(ids, keys.namespace.number)[1]
            self._transients.remove(ids[in_memory])
            return tell(policy, np.where(in_memory, ids, np.int32(UNKNOWN)), now)

    def keep(self, keys: BlockKeys, new: Bools, asked: Retention) -> int:
        """Keep blocks of a save as asked; new: those that it brought. Returns how many."""
        length, life = asked.duration_s or NEVER, asked.ttl_s or NEVER
        fresh = new.astype(np.int32)

        def tell(policy: Retained, entries: Int32s, now: float) -> int:
            return policy.keep(entries, fresh, asked.priority, now + length, now + life, now)

        return self.retain(keys, tell)

    # reserve → fill → commit

    def reserve(
        self, keys: BlockKeys, form: Form | None = None, group: bytes | None = None
    ) -> Reservation:
        """Reserve slots for the keys not yet held; `form` is the usual one if None.

        Takes free slots and clean victims, never waits for I/O; may reserve fewer, from the start
        of the table. Never raises for want of room. With a `group`, the namespace's view says which
        parts of each block are asked for: what the group's other ranks have reserved is joined.
        """
        now = self._clock()
        number = keys.namespace.number if form is None else form.number
        nbytes = self._spaces[number].nbytes
        with self._lock:
            self._sweep(now)
            ids, fresh = self._index.claim(keys.words)
            indices = np.flatnonzero(fresh)
            new = ids if len(indices) == len(ids) else ids[indices]
            self._index.start(new, number)
            if group is not None:
                group = keys.namespace.digest + group
                ids, indices = self._put_off(keys, ids, indices, group, number)
                new = ids[indices]
            held = np.zeros(len(ids), dtype=np.bool_)
            if len(new) < len(ids):
                # What is held already is not given up for what continues it.
                held = self._present(ids, number)[0]
                known = ids[~fresh]
                known = known[known >= 0]
                self._policy.held(self._index.lease(known))
                slots = self._take(nbytes, len(new), now, self._incoming(keys, ids, indices))
                self._unlease(known)
            else:
                slots = self._take(nbytes, len(new), now, self._incoming(keys, ids, indices))
            refused = indices[len(slots) :]
            if len(refused):
                self._metrics.add("save_refused_blocks", len(refused))
                self._index.rows[ids[refused], LEASES] = 0
                self._discard(ids[refused])
                indices, new = indices[: len(slots)], new[: len(slots)]
            self._index.rows[new, SLOT] = slots
            deadline = now + self._reservation_s
            fill = None
            if group is not None:
                given = [keys.key(index) for index in refused.tolist()]
                mask = keys.namespace.view.mask
                whole = (1 << keys.namespace.layout.part_count) - 1
                self._fills.open(group, new, whole, mask, deadline, given)
                mine = np.where(self._index.rows[ids, NAMESPACE] == number, ids, UNKNOWN)
                joined = self._fills.join(group, mine, mask)
                joined[indices] = True
                indices = np.flatnonzero(joined)
                new, fill = ids[indices], self._fills.fill(group)
                slots = self._index.rows[new, SLOT]
                deadline = self._fills.deadline(new) if len(new) else deadline
            parents = ids[indices - 1]
            if len(indices) and indices[0] == 0:
                parents[0] = self._parent(keys)
            reservation = Reservation(
                keys, number, new, indices, held, slots, parents, deadline, self._dead, fill
            )
            if len(new) and fill is None:
                self._reservations[reservation.token] = reservation
            elif len(new):
                self._joined[reservation.token] = (new, keys.namespace.view.mask)
        self._drop_outlived()
        return reservation

    def commit(self, reservation: Reservation, good: Bools | None = None) -> int:
        """Make filled blocks visible; `good` says which are whole (None: all).

        Returns how many are visible now: 0 where the reservation had ended before. Blocks of which
        this is a part are visible, and counted, with the last one.
        """
        if good is None:
            good = np.ones(len(reservation), dtype=np.bool_)
        now = self._clock()
        with self._lock:
            ids = reservation.ids
            if (joined := self._joined.pop(reservation.token, None)) is not None:
                settled = self._fills.settle(*joined, good)
                self._void(settled, "aborted")
                good = settled.whole
            elif self._reservations.pop(reservation.token, None) is None:
                self._acknowledge(reservation.token)
                return 0
            elif not good.all():
                self._unreserve(ids[~good], reservation.slots[~good], reservation.number)
            if not good.all():
                ids = ids[good]
            self._index.rows[ids, STATE] = COMMITTED
            nbytes = self._spaces[reservation.number].nbytes
            for run in _runs(reservation, good, nbytes):
                self._policy.added(run, now)
            takers = self._takers(len(ids), nbytes, reservation.number)
            if takers:
                self._policy.held(ids)
            self._index.rows[ids, LEASES] = len(takers)  # each writer holds them
            for number in takers:
                self._dirty[number].append(ids)
                self._waiting_bytes[number] += len(ids) * nbytes
                self._unwritten += len(ids)
            return len(ids)

    def abort(self, reservation: Reservation) -> None:
        """Give reserved slots back: nobody writes them any more. Idempotent."""
        self.commit(reservation, np.zeros(len(reservation), dtype=np.bool_))

    def widen(self, keys: Sequence[bytes]) -> None:
        """Note blocks that have no room in their usual form: their parts take the spare one."""
        with self._lock:
            self._wide.update(dict.fromkeys(keys))
            while len(self._wide) > WIDE_MAX:
                del self._wide[next(iter(self._wide))]

    def expire(self, reservation: Reservation) -> None:
        """End a reservation ahead of its deadline: its keys are free for others. Idempotent.

        Its slots stay quarantined until `commit` or `abort`.
        """
        with self._lock:
            if (joined := self._joined.get(reservation.token)) is not None:
                self._void(self._fills.give_up(joined[0]), "aborted")
            elif self._reservations.pop(reservation.token, None) is not None:
                self._quarantined(reservation)

    def make_room(self, namespace: Namespace, count: int) -> None:
        """Evict ahead of need, so that the next `reserve` of so many blocks finds free slots.

        Frees several tables' worth at a time, at most a sixteenth of the arena.
        """
        nbytes = self._spaces[namespace.number].nbytes
        slot_bytes = self.arena.pages_of(nbytes) * PAGE_BYTES
        with self._lock:
            room = min(count * ROOM_TABLES, self.arena.nbytes // slot_bytes // 16)
            free = self.arena.available(nbytes)
            short = room - free
            if free < min(count, room):
                for victims in self._policy.victims(short * slot_bytes, self._clock()):
                    self._evict(victims)

    # Moving between arena and tiers

    def waiting_bytes(self, tier: int) -> int:
        """Return how much of memory waits for a tier, what is being written included."""
        return self._waiting_bytes[tier]

    def take_dirty(self, nbytes_max: int, tier: int) -> tuple[Int32s, list[Span]]:
        """Take committed blocks that a tier is still to be given, about so many bytes, pinned.

        Each is given back by `written`. Those that were dropped meanwhile are let go of.
        """
        with self._lock:
            dirty = self._dirty[tier]
            while dirty:
                ids = dirty.popleft()
                slot_bytes = self._spaces[int(self._index.rows[ids[0], NAMESPACE])].nbytes
                count = max(1, nbytes_max // slot_bytes)
                if len(ids) > count:
                    dirty.appendleft(ids[count:])
                    ids = ids[:count]
                here = self._index.states(ids) == COMMITTED
                self._settled(ids[~here], tier)
                if here.any():
                    ids = ids[here]
                    return ids, self._spans(ids, self._index.rows[ids, SLOT])
            return EMPTY, []

    def written(self, ids: Int32s, good: bool, tier: int) -> None:
        """Note that a tier has kept (or could not keep) blocks of `take_dirty`."""
        dropped: list[bytes] = []
        with self._lock:
            if good:
                self._metrics.add("demoted_blocks", len(ids), tier=self._tiers[tier].name)
                here = self._index.states(ids) == COMMITTED
                self._index.add_tier(ids[here], tier)
                dropped = [key.tobytes() for key in self._index.keys(ids[~here])]
            self._settled(ids, tier)
        if dropped:
            self._tiers[tier].drop(dropped)

    def wait_clean(self, timeout_s: float) -> bool:
        """Wait until every committed block has been written below or given up."""
        with self._clean:
            return self._clean.wait_for(lambda: self._unwritten == 0, timeout_s)

    def take_slots(self, ids: Int32s) -> tuple[Slots, list[Span]]:
        """Lend slots to read pinned blocks of one form into; fewer where the arena has no more."""
        if not len(ids):
            return EMPTY, []
        with self._lock:
            nbytes = self._spaces[int(self._index.rows[ids[0], NAMESPACE])].nbytes
            slots = self._take(nbytes, len(ids), self._clock())
            self._lent_pages += self.arena.pages_of(nbytes) * len(slots)
            return slots, self._spans(ids[: len(slots)], slots)

    def fetched(
        self, ids: Int32s, slots: Slots, keep: Bools, parents: Int32s | None = None, tier: int = 0
    ) -> None:
        """Take lent slots back: those in `keep` hold whole blocks, and stay with their entries.

        parents: the id of the block before each one, or NO_PARENT; None where they are not known.
        """
        alone = int(self._index.rows[ids[0], NAMESPACE]) >> FORM_BITS in self._windows
        if parents is None or alone:
            parents = np.full(len(ids), NO_PARENT, dtype=np.int32)
        lives = self._lives(slots, keep)
        retained = self.retaining() if lives.any() else None
        now = self._clock()
        with self._lock:
            nbytes = self._spaces[int(self._index.rows[ids[0], NAMESPACE])].nbytes
            self._lent_pages -= self.arena.pages_of(nbytes) * len(slots)
            rows = self._index.rows
            # Another fetch may have been first, and a block may have been dropped meanwhile.
            first = keep & (rows[ids, SLOT] == NO_SLOT)
            first &= (rows[ids, STATE] & STATE_MASK) == COMMITTED
            chosen = np.flatnonzero(first)
            once = np.unique(ids[chosen], return_index=True)[1]
            first[np.delete(chosen, once)] = False  # a table may name a block twice
            rows[ids[first], SLOT] = slots[first]
            self.arena.give(nbytes, slots[~first])
            prints = self._index.prints(ids)
            for run in _split(ids[first], prints[first], parents[first], nbytes):
                self._policy.added(run, now)
            if retained is not None:
                for life in np.unique(lives[first & (lives > 0)]).tolist():
                    here = ids[first & (lives == life)]
                    retained.keep(here, np.ones_like(here), USUAL, NEVER, now + life, now)
            self._policy.held(ids[first])
            self._transients.add(ids[first], self.arena.pages_of(nbytes))
            self._metrics.add("fetched_blocks", int(first.sum()), tier=self._tiers[tier].name)

    def _lives(self, slots: Slots, keep: Bools) -> NDArray[np.float64]:
        """Return how many seconds blocks have left to live, by their frames; 0: no limit."""
        lives = np.zeros(len(slots))
        for at in np.flatnonzero(keep).tolist():
            expires = expires_of(self.arena.view(int(slots[at]), EXPIRES.stop))
            if expires != NO_EXPIRY:
                lives[at] = max(1e-3, expires - time.time())
        return lives

    def corrupt(self, ids: Int32s, tier: int | None) -> None:
        """Drop pinned blocks whose bytes did not verify: no one is served them again.

        Those of a tier go from there; those of memory (None) go everywhere, since what was written
        below may have been wrong already.
        """
        if not len(ids):
            return
        where = "memory" if tier is None else self._tiers[tier].name
        self._metrics.add("corrupt_blocks", len(ids), tier=where)
        if tier is None:
            with self._lock:
                gone = self._drop(ids)
            self._drop_below(gone)
        else:
            with self._lock:
                keys = [key.tobytes() for key in self._index.keys(ids)]
            self._tiers[tier].drop(keys)
            self.dropped(tier, keys)

    def drop(self, keys: BlockKeys) -> int:
        """Forget blocks everywhere; leased ones go when they are released. Returns how many."""
        with self._lock:
            ids = self._index.find(keys.words)
            ids = ids[self._present(ids, keys.namespace.number)[0]]
            gone = self._drop(ids)
        self._drop_below(gone, [keys.key(index) for index in range(len(keys))])
        self._metrics.add("dropped_blocks", len(gone))
        return len(gone)

    def squeeze(self, nbytes: int) -> int:
        """Evict clean, unleased blocks until at most `nbytes` of memory are taken."""
        with self._lock:
            before = self.arena.taken_pages
            excess = before * PAGE_BYTES - nbytes
            if excess > 0:
                for victims in self._policy.victims(excess, self._clock()):
                    self._evict(victims)
            return (before - self.arena.taken_pages) * PAGE_BYTES

    def limit(self, nbytes: int) -> int:
        """Use at most so many bytes of memory from now on, evicting clean, unleased blocks.

        Returns how many bytes are in use still: call again when more has been released.
        """
        self.squeeze(nbytes)
        with self._lock:
            return self.arena.limit(nbytes)

    def detach(self) -> None:
        """After a fork, in the child: the lock may be held by a thread that is not here."""
        self._lock = threading.Lock()
        self._clean = threading.Condition(self._lock)

    # Looking on

    def stats(self) -> dict[str, int]:
        """Return counts of blocks and bytes. Blocks are counted a stretch of rows at a time, so
        that nobody waits for all of them: those that move meanwhile may be missed.
        """
        blocks = in_memory = in_tiers = 0
        by_tier = [0] * len(self._tiers)
        start = 0
        while True:
            with self._lock:
                rows = self._index.rows[start : start + STATS_ROWS].copy()
            if not len(rows):
                break
            start += STATS_ROWS
            committed = (rows[:, STATE] & STATE_MASK) == COMMITTED
            tiers = np.where(committed, rows[:, STATE] >> TIER_SHIFT, 0)
            blocks += int(committed.sum())
            in_memory += int((committed & (rows[:, SLOT] != NO_SLOT)).sum())
            in_tiers += int((tiers != 0).sum())
            for number in range(len(by_tier)):
                by_tier[number] += int((tiers >> number & 1).sum())
        with self._lock:
            return {
                "blocks": blocks,
                "memory_blocks": in_memory,
                "memory_bytes": self.arena.taken_pages * PAGE_BYTES,
                "tier_blocks": in_tiers,
                **{
                    f"{tier.name}_blocks": count
                    for tier, count in zip(self._tiers, by_tier, strict=True)
                },
                "leases": len(self._leases),
                "reservations": len(self._reservations) + len(self._joined),
                "quarantined_blocks": self._fills.late
                + sum(len(slots) for _, slots in self._quarantine.values()),
                "unwritten_blocks": self._unwritten,
                "index_bytes": self._index.nbytes + self._policy.nbytes + self._transients.nbytes,
            }

    def check(self) -> None:
        """Raise AssertionError where the books do not balance. At rest: no lease, no reservation,
        nothing lent."""
        with self._lock:
            live = self._index.live()
            rows = self._index.rows[live]
            state = rows[:, STATE] & STATE_MASK
            assert set(state.tolist()) <= {FILLING, COMMITTED}
            slots = rows[rows[:, SLOT] != NO_SLOT]
            assert len(np.unique(slots[:, SLOT])) == len(slots)
            pages = sum(
                self.arena.pages_of(self._spaces[number].nbytes) for number in slots[:, NAMESPACE]
            )
            pages += self._lent_pages
            for nbytes, held in self._quarantine.values():
                pages += self.arena.pages_of(nbytes) * len(held)
            assert (rows[:, LEASES] >= 0).all()
            doomed = self._index.rows[(self._index.rows[:, STATE] & STATE_MASK) == DOOMED]
            pages += sum(
                self.arena.pages_of(self._spaces[number].nbytes)
                for number in doomed[doomed[:, SLOT] != NO_SLOT, NAMESPACE]
            )
            under_way = self._reservations or self._joined or self._fills.filling
            if not self._leases and not under_way and not self._unwritten:
                assert pages == self.arena.taken_pages, (pages, self.arena.taken_pages)
                if not self._lent_pages:
                    assert not rows[:, LEASES].any()
                    assert (state == COMMITTED).all()
            nowhere = (rows[:, SLOT] == NO_SLOT) & (rows[:, STATE] >> TIER_SHIFT == 0)
            assert not nowhere.any()

    # Under the lock

    def _number(self, digest: bytes, nbytes: int, keep: Container[int] = ()) -> int:
        """Return the number of a namespace's frames of one size; -1 where it has two others.

        A size that is none of `keep`, if those are given, gives way: no frame has it any more.
        """
        first = self._numbers.get(digest)
        if first is None:
            first = self._numbers[digest] = len(self._spaces)
            self._spaces += [Space(digest, 0) for _ in range(1 << FORM_BITS)]
        numbers = range(first, first + (1 << FORM_BITS))
        for number in numbers:
            if self._spaces[number].nbytes in (nbytes, 0):
                self._spaces[number].nbytes = nbytes
                return number
        for number in numbers if keep else ():
            if self._spaces[number].nbytes not in keep:
                self._spaces[number].nbytes = nbytes
                return number
        return UNKNOWN

    def _adopt(self, tier: int, held: Held) -> int:
        number = self._number(held.identity, held.frame_bytes)
        if number == UNKNOWN:
            return 0
        keys = np.ascontiguousarray(held.keys)
        ids, fresh = self._index.claim(keys.view("<u8").reshape(-1, KEY_BYTES // 8))
        rows = self._index.rows
        rows[ids[fresh], SLOT] = NO_SLOT
        rows[ids[fresh], LEASES] = 0
        rows[ids[fresh], STATE] = COMMITTED
        rows[ids[fresh], NAMESPACE] = number
        self._index.add_tier(ids, tier)
        return int(fresh.sum())

    def _takers(self, count: int, nbytes: int, namespace: int) -> list[int]:
        """Return the tiers that are to be given so many blocks.

        A remote tier may lag behind; what waits for it is pinned, so that is a quarter of memory.
        """
        takers = []
        for number, tier in enumerate(self._tiers if count else ()):
            waiting = self._waiting_bytes[number] + count * nbytes
            if self._spared.get(namespace >> FORM_BITS, 0) >> number & 1:
                self._metrics.add("write_skipped_blocks", count, tier=tier.name)
            elif tier.remote and waiting > max(self.arena.nbytes // 4, count * nbytes):
                self._metrics.add("write_skipped_blocks", count, tier=tier.name)
            else:
                takers.append(number)
        return takers

    def _settled(self, ids: Int32s, tier: int) -> None:
        """Note that blocks of one size wait for a tier no more."""
        if not len(ids):
            return
        nbytes = self._spaces[int(self._index.rows[ids[0], NAMESPACE])].nbytes
        self._waiting_bytes[tier] -= len(ids) * nbytes
        self._unlease(ids)
        self._unwritten -= len(ids)
        if not self._unwritten:
            self._clean.notify_all()

    def _let_go(self, count: int, now: float) -> bool:
        """Give up writing about so many blocks, those that have waited longest: tiers are too slow.

        False where there are victims (which the policy would rather keep), or none waits but what
        is being written.
        """
        found = False
        # A policy that is asked takes memory to be full: only where there is something to let go.
        if not any(self._dirty) or len(next(self._policy.victims(1, now), EMPTY)):
            return found
        for tier, dirty in enumerate(self._dirty):
            if not dirty:
                continue
            ids = dirty.popleft()
            if len(ids) > count:  # the last ones first: others continue from those before
                dirty.appendleft(ids[:-count])
                ids = ids[-count:]
            self._metrics.add("write_skipped_blocks", len(ids), tier=self._tiers[tier].name)
            self._settled(ids, tier)
            found = True
        return found

    def _reachable(self) -> int:
        """Return the bits of the tiers that are not left alone for failing."""
        return sum(1 << number for number, tier in enumerate(self._tiers) if not tier.away)

    def _present(self, ids: Int32s, number: int, bits: int = -1) -> tuple[Bools, Bools]:
        """Return which ids are blocks of this namespace, and which of them are in memory.

        bits: of the tiers that count.
        """
        rows = self._index.rows[ids]
        state = rows[:, STATE]
        mine = rows[:, NAMESPACE] >> FORM_BITS == number >> FORM_BITS
        here = (ids >= 0) & ((state & STATE_MASK) == COMMITTED) & mine
        in_memory = here & (rows[:, SLOT] != NO_SLOT)
        return in_memory | (here & (state >> TIER_SHIFT & bits != 0)), in_memory

    def _prefix(self, keys: BlockKeys) -> tuple[Int32s, int]:
        return self._index.prefix(keys.words, keys.namespace.number, self._reachable())

    def _parent(self, keys: BlockKeys) -> int:
        if keys.parent == ROOT_KEY:
            return NO_PARENT
        return int(self._index.find(_words([keys.parent]))[0])

    def _incoming(self, keys: BlockKeys, ids: Int32s, indices: NDArray[np.intp]) -> Run:
        """Say what wants to come in; the last stretch of it alone, where it has several."""
        if not len(indices):
            return Run(EMPTY, NO_PARENT, 0, 0)
        start = list(_consecutive(indices))[-1][0]
        first = int(indices[start])
        parent = int(ids[first - 1]) if first else self._parent(keys)
        return Run(EMPTY, parent, keys.position + first, 0, keys.prints[indices[start:]])

    def _take(self, nbytes: int, count: int, now: float, incoming: Run | None = None) -> Slots:
        """Take slots, for what is `incoming` or (None) for a fetch."""
        slots = self.arena.take(nbytes, count)
        if len(slots) == count:
            return slots
        compacted = self.arena.compact()
        if incoming is None:
            compacted |= self._recycle(self.arena.pages_of(nbytes) * (count - len(slots)))
        if compacted:
            slots = np.concatenate([slots, self.arena.take(nbytes, count - len(slots))])
        parts = [slots]
        missing = count - len(slots)
        slot_bytes = self.arena.pages_of(nbytes) * PAGE_BYTES
        for victims in self._policy.victims(missing * slot_bytes, now, incoming):
            mixed = self._evict(victims)
            if mixed:
                self.arena.compact()
            parts.append(self.arena.take(nbytes, missing))
            missing -= len(parts[-1])
            if not missing:
                break
        more = missing
        while missing:
            # Slots of other sizes were given up: their extents may be whole now, or more must go.
            victims = next(self._policy.victims(missing * slot_bytes, now, incoming), EMPTY)
            if len(victims):
                self._evict(victims)
            elif incoming is not None and self._let_go(more, now):
                more *= 2
            else:
                break
            self.arena.compact()
            parts.append(self.arena.take(nbytes, missing))
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def _recycle(self, pages: int) -> bool:
        """Give up what was fetched and not asked for again, for a fetch that is beyond the share.

        Returns whether there was any.
        """
        share = self.arena.nbytes // PAGE_BYTES // TRANSIENT_SHARE
        over = self._transients.pages + self._lent_pages + pages - share
        if over <= 0 or not self._transients.pages:
            return False
        leases = self._index.rows[:, LEASES]
        old = self._transients.oldest(min(over, pages), leases)
        if len(old) and self._evict(old):
            self.arena.compact()
        return len(old) > 0

    def _evict(self, ids: Int32s, reason: str = "memory") -> bool:
        """Take victims out of memory. Returns whether their slots have several sizes."""
        self._policy.removed(ids)
        mixed = self._give_slots(ids)
        self._discard(ids[self._found_nowhere_else(ids)] if self._tiers else ids)
        self._metrics.add("evicted_blocks", len(ids), reason=reason)
        return mixed

    def _found_nowhere_else(self, ids: Int32s) -> Bools:
        """Which have no copy that the index must know of: a remote tier is asked again."""
        nowhere: Bools = self._index.tiers(ids) & ~self._remote_bits == 0
        return nowhere

    def _take_in(self, keys: BlockKeys, found: Int32s) -> Int32s:
        """Enter the leading blocks that remote tiers hold; whoever leases them keeps them here.

        Returns the ids of those that are new.
        """
        number = keys.namespace.number
        present = self._present(self._index.find(keys.words), number)[0]
        count = _leading(present | (found[:, 0] >= 0))
        rows = np.flatnonzero(found[:count, 0] >= 0)
        if not len(rows):
            return EMPTY
        ids, fresh = self._index.claim(np.ascontiguousarray(keys.words[rows]))
        self._index.rows[ids[fresh]] = (NO_SLOT, 0, number, COMMITTED)
        self._index.rows[ids[fresh], NAMESPACE] = found[rows[fresh], 1]
        known = self._index.states(ids) == COMMITTED  # not those that someone is filling
        known &= self._index.rows[ids, NAMESPACE] == found[rows, 1]  # nor those of another form
        for tier in set(found[rows, 0].tolist()):
            self._index.add_tier(ids[known & (found[rows, 0] == tier)], tier)
        return ids[fresh]

    def _give_slots(self, ids: Int32s) -> bool:
        """Give entries' slots back to the arena. Returns whether they had several sizes."""
        if not len(ids):
            return False
        self._transients.remove(ids)
        rows = self._index.rows
        slots = rows[ids, SLOT]
        numbers = rows[ids, NAMESPACE]
        rows[ids, SLOT] = NO_SLOT
        if slots.min() < 0:
            held = slots != NO_SLOT
            slots, numbers = slots[held], numbers[held]
        kinds = set(numbers.tolist())
        for number in kinds:
            mine = slots if len(kinds) == 1 else slots[numbers == number]
            self.arena.give(self._spaces[number].nbytes, mine)
        return len(kinds) > 1

    def _unlease(self, ids: Int32s) -> None:
        free, doomed = self._index.unlease(ids)
        if len(doomed):
            self._give_slots(doomed)
            self._index.rows[doomed, STATE] = 0
            self._index.free(doomed)
        if not len(free):
            return
        if self._remote_bits:
            away = (self._index.rows[free, SLOT] == NO_SLOT) & self._found_nowhere_else(free)
            self._discard(free[away])
            free = free[~away]
        self._policy.freed(free)

    def _discard(self, ids: Int32s) -> None:
        """Forget unleased entries without a slot."""
        if len(ids):
            self._index.erase(ids)
            self._index.rows[ids, STATE] = 0
            self._index.free(ids)

    def _forget(self, ids: Int32s) -> None:
        """Forget entries now, or when their last lease ends."""
        leased = self._index.rows[ids, LEASES] != 0
        waiting = ids[leased]
        self._index.erase(waiting)
        self._index.rows[waiting, STATE] = DOOMED
        self._give_slots(ids[~leased])
        self._discard(ids[~leased])

    def _drop(self, ids: Int32s) -> list[bytes]:
        ids = np.unique(ids)
        ids = ids[self._index.states(ids) == COMMITTED]
        keys = [key.tobytes() for key in self._index.keys(ids)]
        self._policy.removed(ids)
        self._forget(ids)
        return keys

    def _outlive(self, ids: Int32s) -> bool:
        """Forget those whose time is over but that a sweep leaves: leased, or with a child."""
        if not isinstance(self._policy, Retained):
            return False
        over = ids[self._policy.outlived(ids)]
        below = over[self._index.tiers(over) != 0]
        self._outlived += [key.tobytes() for key in self._index.keys(below)]
        self._metrics.add("evicted_blocks", len(self._drop(over)), reason="time")
        return len(over) > 0

    def _drop_outlived(self) -> None:
        """Not under the lock: have tiers drop what has outlived its time to live."""
        if self._outlived:
            keys, self._outlived = self._outlived, []
            self._drop_below(keys)

    def _drop_below(self, keys: Sequence[bytes], asked: Sequence[bytes] = ()) -> None:
        for tier in self._tiers:
            tier.drop(asked or keys if tier.remote else keys)

    def _unreserve(self, ids: Int32s, slots: Slots, number: int) -> None:
        if len(ids):
            self._index.rows[ids, LEASES] = 0
            self.arena.give(self._spaces[number].nbytes, slots)
            self._discard(ids)

    def _put_off(
        self, keys: BlockKeys, ids: Int32s, indices: NDArray[np.intp], group: bytes, number: int
    ) -> tuple[Int32s, NDArray[np.intp]]:
        """Leave new rows out that are not for this group to fill, or not in this form.

        Returns the ids of all keys, UNKNOWN for those, and the indices of the others.
        """
        forms = self._forms[keys.namespace.number]
        spare = forms.spare is not None and number == forms.spare.number
        known, crowded = self._fills.given_up(group), self._fills.crowded
        if not (known or self._wide or spare or crowded):
            return ids, indices
        names = [keys.key(index) for index in indices.tolist()]
        off = np.array(
            [crowded or key in known or (key in self._wide) != spare for key in names],
            dtype=np.bool_,
        )
        gone = ids[indices[off]]
        self._index.rows[gone, LEASES] = 0
        self._discard(gone)
        return np.where(np.isin(ids, gone), np.int32(UNKNOWN), ids), indices[~off]

    def _void(self, settled: Settled, reason: str) -> None:
        """Let go of blocks that were not filled whole; their slots wait for the last writer."""
        if len(settled.void):
            self._index.erase(settled.void)
            self._index.rows[settled.void, STATE] = DOOMED
            self._metrics.add("incomplete_blocks", len(settled.void), reason=reason)
        if len(settled.over):
            self._unlease(settled.over)

    def _sweep(self, now: float) -> None:
        """Reap the leases and reservations of dead owners, and blocks whose time is over.

        Leases and reservations stand in order of deadline.
        """
        for old in self._policy.expired(now):
            below = old[self._index.tiers(old) != 0]
            self._outlived += [key.tobytes() for key in self._index.keys(below)]
            below = below[~self._found_nowhere_else(below)]
            self._evict(old, "time")
            self._forget(below)
        while self._dead:
            self._acknowledge(self._dead.popleft())
        if self._fills.due(now):
            self._void(self._fills.expire(now), "missing")
        while self._leases:
            lease = next(iter(self._leases.values()))
            if lease.deadline > now:
                break
            del self._leases[lease.token]
            self._unlease(lease.ids)
            self._metrics.add("expired", 1, kind="lease")
        while self._reservations:
            reservation = next(iter(self._reservations.values()))
            if reservation.deadline > now:
                break
            del self._reservations[reservation.token]
            self._quarantined(reservation)

    def _quarantined(self, reservation: Reservation) -> None:
        nbytes = self._spaces[reservation.number].nbytes
        self._quarantine[reservation.token] = (nbytes, reservation.slots)
        self._index.rows[reservation.ids, LEASES] = 0
        self._discard(reservation.ids)
        self._metrics.add("expired", 1, kind="reservation")

    def _acknowledge(self, token: bytes) -> None:
        if (joined := self._joined.pop(token, None)) is not None:
            none = np.zeros(len(joined[0]), dtype=np.bool_)
            self._void(self._fills.settle(*joined, none), "aborted")
            return
        nbytes, slots = self._quarantine.pop(token, (0, EMPTY))
        if len(slots):
            self.arena.give(nbytes, slots)

    def _spans(self, ids: Int32s, slots: Slots) -> list[Span]:
        if not len(ids):
            return []
        nbytes = self._spaces[int(self._index.rows[ids[0], NAMESPACE])].nbytes
        room = self.arena.pages_of(nbytes) * PAGE_BYTES
        return [
            Span(key.tobytes(), self.arena.view(slot, room), nbytes)
            for key, slot in zip(self._index.keys(ids), slots.tolist(), strict=True)
        ]


def exercise(make: Callable[[], Policy]) -> None:
    """Run every loop of index and policy once, so that they are compiled before they are needed."""
    for _ in range(LOOPS_MAX):
        try:
            _exercise(make())
            return
        except OSError:  # what a loop was compiled to could not be kept on disk; it is in memory
            continue


def _exercise(policy: Policy) -> None:
    index = Index()
    words = _words([bytes(KEY_BYTES)])
    ids, _ = index.claim(words)
    for _ in range(ROWS_MIN):  # until the columns have grown
        index.claim(_words([os.urandom(KEY_BYTES)]))
    index.find(words)
    index.prefix(words, 0, 0)
    run = Run(index.lease(ids), NO_PARENT, 0, PAGE_BYTES, index.prints(ids))
    for second in range(64):  # until the policy has learned
        policy.touched(run, float(second))
        policy.added(run, float(second))
        policy.removed(ids)
    policy.added(run, 64.0)
    if isinstance(policy, Retained):
        policy.keep(ids, np.ones(len(ids), dtype=np.int32), 60, 65.0, 66.0, 64.0)
        policy.expect(ids, 65.0, 64.0)
        policy.end(ids, 65.0)
    policy.held(ids)
    policy.freed(index.unlease(ids)[0])
    list(policy.expired(64.0))
    for victims in policy.victims(PAGE_BYTES, 64.0, run):
        policy.removed(victims)
    index.erase(ids)
    index.free(ids)


def _words(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, KEY_BYTES // 8)


def _leading(flags: Bools) -> int:
    return len(flags) if flags.all() else int(flags.argmin())


def _lowest(bits: Int32s, shift: int) -> Int32s:
    """Return the number of the lowest bit set, plus `shift`; -1 where none is."""
    lowest = np.log2(np.maximum(bits & -bits, 1)).astype(np.int32)
    return np.where(bits != 0, lowest + np.int32(shift), np.int32(-1))


def _runs(reservation: Reservation, good: Bools, nbytes: int) -> Iterator[Run]:
    """Cut what is committed into runs of consecutive blocks."""
    indices, ids, parents = reservation.indices, reservation.ids, reservation.parents
    if not good.all():
        indices, ids, parents = indices[good], ids[good], parents[good]
    prints, layout = reservation.keys.prints[indices], reservation.keys.namespace.layout
    if layout.attention != "full":
        # None keeps another: the first of them go first, but for the sinks.
        sinks = reservation.keys.position + indices < layout.sink_blocks
        for at in [*np.flatnonzero(~sinks).tolist(), *np.flatnonzero(sinks).tolist()]:
            position, one = reservation.keys.position + int(indices[at]), slice(at, at + 1)
            yield Run(ids[one], NO_PARENT, position, nbytes, prints[one])
        return
    for start, stop in _consecutive(indices):
        position = reservation.keys.position + int(indices[start])
        yield Run(ids[start:stop], int(parents[start]), position, nbytes, prints[start:stop])


def _split(ids: Int32s, prints: Int64s, parents: Int32s, nbytes: int) -> Iterator[Run]:
    """Cut blocks into runs, each of which continues the one before. Positions are not known: 0."""
    if not len(ids):
        return
    cuts = [0, *(np.flatnonzero(parents[1:] != ids[:-1]) + 1).tolist(), len(ids)]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        yield Run(ids[start:stop], int(parents[start]), 0, nbytes, prints[start:stop])


def _consecutive(indices: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each stretch of `indices` that counts up by one."""
    count = len(indices)
    if not count:
        return
    if int(indices[-1]) - int(indices[0]) == count - 1:
        yield 0, count
        return
    cuts = [0, *(np.flatnonzero(np.diff(indices) != 1) + 1).tolist(), count]
    yield from zip(cuts[:-1], cuts[1:], strict=True)
