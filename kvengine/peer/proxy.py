"""The daemon's store as one client sees it, from its welcome until the connection is lost.

Verbs are those of kvengine.blocks.Blocks; each is one round trip, or less: what a lease says is
kept here, so that loads pin and unpin without asking. Once it is lost every verb misses or does
nothing, and the memory stays mapped as long as a transfer uses it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from kvengine.codec import Codec, Forms
from kvengine.compiled import Int32s
from kvengine.errors import AwayError, LayoutError
from kvengine.fetches import Fetches, Ready, Start
from kvengine.forms import Form, form_of
from kvengine.index import NO_SLOT
from kvengine.keys import BlockKeys, Namespace
from kvengine.lease import Bools, Lease, Reservation
from kvengine.peer import messages as m
from kvengine.peer.channel import Channel, Lost
from kvengine.policy import Request
from kvengine.retention import Retention
from kvengine.slab import PAGE_BYTES, Slab, Slots, is_sealed
from kvengine.store import EMPTY
from kvengine.tiers import Span

ROW_BITS = 17  # of the name of a leased block: the others are the number of its lease
HOLDS_MAX = 1 << (31 - ROW_BITS)
assert m.KEYS_MAX <= 1 << ROW_BITS
LATER_S = 0.05  # what may be said later is said by then
SLOW_S = 30.0  # for what may load kernels, or walk over all blocks


@dataclass(slots=True, eq=False)
class Hold:
    """A lease that the daemon has given. It goes back once it is over, and not pinned any more."""

    token: bytes
    slots: Slots
    usual: int
    forms: Int32s | None  # numbers, where not all are the usual one
    generations: NDArray[np.uint32]
    pinned: int = 0
    over: bool = False


@dataclass(slots=True)
class Space:
    """A namespace as this daemon numbers it."""

    number: int
    forms: Forms[Form]


@dataclass(slots=True, eq=False)
class Waiting:
    """A load that waits for blocks to come into memory."""

    hold: Hold
    rows: Int32s
    ready: Ready


class Proxy:
    """See the module. Any thread may call any verb."""

    def __init__(
        self, path: str, tenant: str, key: bytes, writable: bool, timeout_s: float
    ) -> None:
        """Say hello, and map the memory. Raises OSError where no daemon answers, AwayError where
        it refuses.
        """
        self._counter = count(1)
        self._lock = threading.Lock()
        self.lost = False
        self._holds: dict[int, Hold] = {}
        self._rows: dict[bytes, int] = {}  # numbers of holds by token
        self._free = deque(range(HOLDS_MAX))
        self._waiting: dict[int, Waiting] = {}
        self._spaces: dict[int, Space] = {}  # by the client's number
        self._sizes: dict[int, int] = {}  # of frames, by the number of their form
        self._filling: set[bytes] = set()
        self._dead: deque[bytes] = deque()  # tokens of reservations that nobody has any more
        self._channel = Channel(path, timeout_s)
        self._ear: Channel | None = None
        handles: list[int] = []
        try:
            hello = m.Hello(self._next(), m.VERSION, m.VERSION, tenant, key, writable)
            said, handles = self._channel.ask_with(hello, descriptors=True)
            if isinstance(said, m.Refused):
                raise AwayError(f"the daemon at {path} refuses: {said.text}")
            if not isinstance(said, m.Welcome) or len(handles) != 2:
                raise Lost("no welcome")
            self.welcome = said
            pages = said.nbytes // PAGE_BYTES
            words = -(-pages * 4 // PAGE_BYTES) * PAGE_BYTES
            if not (is_sealed(handles[0], said.nbytes) and is_sealed(handles[1], words)):
                raise Lost("memory that others could shrink")
            self.arena = Slab(said.nbytes, handles[0], writable and said.writable)
            self._words = np.frombuffer(
                Slab(words, handles[1], writable=False).memory, dtype=np.uint32
            )
            self._ear = Channel(path, timeout_s, LATER_S)
            if not isinstance(self._ear.ask(m.Listen(self._next(), said.session)), m.Done):
                raise Lost("the daemon has forgotten the session")
        except BaseException:
            self._channel.close()
            if self._ear is not None:
                self._ear.close()
            raise
        finally:
            for handle in handles:
                os.close(handle)

    # Names

    def open(self, message: m.Open) -> m.Opened:
        """Ask for a namespace, which `enter` takes in.

        Raises LayoutError where the daemon cannot take it, AwayError where it is not there.
        """
        said = self._ask(message, SLOW_S)
        if isinstance(said, m.Refused):
            raise LayoutError(said.text)
        if not isinstance(said, m.Opened):
            raise AwayError("the daemon is away: namespaces are made when it is back")
        return said

    def enter(self, space: Namespace, codecs: Forms[Codec], said: m.Opened) -> None:
        """Know a namespace from now on, by the number that the client has given it."""
        numbers = dict(zip(codecs, said.numbers, strict=True))
        made = codecs.map(lambda codec: form_of(space.layout, space.digest, codec, numbers[codec]))
        self._sizes |= {each.number: each.nbytes for each in made}
        self._spaces[space.number] = Space(made.usual.number, made)

    def knows(self, namespace: Namespace) -> bool:
        """Say whether a namespace has been opened here."""
        return namespace.number in self._spaces

    def forms(self, namespace: Namespace) -> Forms[Form]:
        """Return what a namespace's blocks are saved as."""
        return self._spaces[namespace.number].forms

    def frame_bytes(self, number: int) -> int:
        """Return the size of a form's frames."""
        return self._sizes[number]

    # match → use → release

    def probe(self, keys: BlockKeys) -> int:
        """Count the leading blocks that are held."""
        return self._count(m.Probe(*self._table(keys)))

    def contains(self, keys: BlockKeys) -> Bools:
        """Say for each key whether its block is held."""
        said = self._ask(m.Contains(*self._table(keys)))
        held = np.zeros(len(keys), dtype=np.bool_)
        if isinstance(said, m.Which) and len(said.flags) <= len(keys):
            held[: len(said.flags)] = np.frombuffer(said.flags, dtype=np.uint8) == 1
        return held

    def match(self, keys: BlockKeys, split: bool, request: Request | None) -> Lease:
        """Lease the leading blocks that are held; of a very long prompt, of its first part."""
        request = request or Request()
        message = m.Match(*self._table(keys), split, request.output_tokens, request.stop)
        return self._enter(keys, self._ask(message))

    def adopt(self, token: bytes, namespace: Namespace) -> Lease | None:
        """Lease what another process of this tenant has leased. None: it has ended."""
        said = self._ask(m.Adopt(self._next(), token))
        if not isinstance(said, m.Adopted) or said.space != self._spaces[namespace.number].number:
            if isinstance(said, m.Adopted):
                self._tell(m.Release(0, said.lease.token))
            return None
        keys = BlockKeys(namespace, said.keys, said.position, said.parent)
        return self._enter(keys, said.lease)

    def _enter(self, keys: BlockKeys, said: m.Answer | None) -> Lease:
        """Make a lease of what the daemon says."""
        if not isinstance(said, m.Leased) or not said.slots:
            return Lease(keys, EMPTY, 0, 0.0, self.release)
        slots = np.frombuffer(said.slots, dtype="<i4")
        usual, forms = self._spaces[keys.namespace.number].number, None
        if said.forms:
            forms = (usual & ~1) | np.frombuffer(said.forms, dtype=np.uint8).astype(np.int32)
        generations = np.frombuffer(said.generations, dtype="<u4")
        hold = Hold(said.token, slots, usual, forms, generations)
        with self._lock:
            if self.lost or not self._free:
                number = -1
            else:
                number = self._free.popleft()
                self._holds[number] = hold
                self._rows[hold.token] = number
        if number < 0 or not self._fits(hold):
            self._tell(m.Release(0, said.token))
            return Lease(keys, EMPTY, 0, 0.0, self.release)
        first = number << ROW_BITS
        ids = np.arange(first, first + len(slots), dtype=np.int32)
        deadline = time.monotonic() + said.lease_s
        lease = Lease(keys, ids, said.in_memory, deadline, self.release, said.token)
        lease.worth = range(said.first, min(said.stop, len(slots)))
        return lease

    def _fits(self, hold: Hold) -> bool:
        """Whether what the daemon says lies in the memory that is mapped."""
        numbers = {hold.usual} if hold.forms is None else set(hold.forms.tolist())
        sizes = [self._sizes.get(number, 0) for number in numbers]
        lengths = len(hold.slots) == len(hold.generations)
        if hold.forms is not None:
            lengths &= len(hold.forms) == len(hold.slots)
        return lengths and all(sizes) and self._holds_all(hold.slots, max(sizes), NO_SLOT)

    def _holds_all(self, slots: Slots, nbytes: int, least: int) -> bool:
        """Whether slots of so many bytes lie in the memory that is mapped."""
        if not len(slots):
            return True
        last = int(slots.max())
        low = last if len(slots) == 1 else int(slots.min())
        return low >= least and last * PAGE_BYTES + nbytes <= self.arena.nbytes

    def release(self, lease: Lease) -> None:
        """Let a lease's blocks go, once no transfer uses them. Idempotent."""
        with self._lock:
            number = self._rows.get(lease.token)
            if number is None:
                return
            self._holds[number].over = True
            gone = self._gone(number)
        if gone:
            self._tell(m.Release(0, gone), later=True)

    def _gone(self, number: int) -> bytes:
        """Under the lock: forget a hold that is over and not pinned; return its token, or b""."""
        hold = self._holds[number]
        if not hold.over or hold.pinned:
            return b""
        del self._holds[number], self._rows[hold.token]
        self._free.append(number)
        return b"" if self.lost else hold.token

    def pin(self, lease: Lease, first: int, count: int) -> tuple[Int32s, Slots, Int32s]:
        """Hold blocks of a live lease for a transfer. See `Store.pin`."""
        with self._lock:
            number = self._rows.get(lease.token)
            hold = None if number is None else self._holds[number]
            if hold is None or hold.over or self.lost:
                return EMPTY, EMPTY, EMPTY
            ids = lease.ids[first : first + count]
            hold.pinned += len(ids)
            part = slice(first, first + len(ids))
            if hold.forms is None:
                forms = np.full(len(ids), hold.usual, dtype=np.int32)
            else:
                forms = hold.forms[part]
            return ids, hold.slots[part], forms

    def repin(self, ids: Int32s) -> None:
        """Hold pinned blocks once more."""
        if len(ids):
            with self._lock:
                self._hold(ids).pinned += len(ids)

    def unpin(self, ids: Int32s) -> None:
        """Give back what `pin` held."""
        if not len(ids):
            return
        with self._lock:
            self._hold(ids).pinned -= len(ids)
            gone = self._gone(int(ids[0]) >> ROW_BITS)
        if gone:
            self._tell(m.Release(0, gone), later=True)

    def slots(self, ids: Int32s) -> Slots:
        """Return where pinned blocks lie, as far as the daemon has said."""
        with self._lock:
            slots: Slots = self._hold(ids).slots[_rows(ids)]
            return slots

    def still(self, ids: Int32s) -> Bools:
        """Say of pinned blocks which have lain in their slots all the time."""
        with self._lock:
            hold, rows = self._hold(ids), _rows(ids)
            slots, generations = hold.slots[rows], hold.generations[rows]
        still: Bools = (slots != NO_SLOT) & (self._words[slots] == generations)
        return still

    def _hold(self, ids: Int32s) -> Hold:
        return self._holds[int(ids[0]) >> ROW_BITS]

    def corrupt(self, ids: Int32s, tier: int | None) -> None:
        """Name pinned blocks whose bytes did not verify."""
        if len(ids):
            with self._lock:
                token = self._hold(ids).token
            self._tell(m.Corrupt(0, token, _rows(ids).tobytes()))

    # What is in tiers is the daemon's to fetch

    def homes(self, ids: Int32s, below: int = -1) -> Int32s:
        """Say that what is not in memory is with the daemon: tier 0, which claims all of it."""
        return np.zeros(len(ids), dtype=np.int32)

    def take_slots(self, ids: Int32s) -> tuple[Slots, list[Span]]:
        """Lend no slots: clients read no tier."""
        return EMPTY, []

    def fetched(
        self, ids: Int32s, slots: Slots, keep: Bools, parents: Int32s | None = None, tier: int = 0
    ) -> None:
        """Take no slots back, for none are lent."""
        assert not len(slots)

    def fetch(self, ids: Int32s, ready: Ready) -> None:
        """Have pinned blocks read into memory, and call `ready`, once, when that is over."""
        number = self._next()
        with self._lock:
            lost = self.lost
            if not lost:
                hold, rows = self._hold(ids), _rows(ids)
                self._waiting[number] = Waiting(hold, rows, ready)
        if lost:
            ready()
        else:
            self._tell(m.Fetch(number, hold.token, rows.tobytes(), self.welcome.fetch_s))

    def ahead(self, lease: Lease, first: int) -> int:
        """Have the daemon read leased blocks from `first` on ahead. Returns how many are asked."""
        with self._lock:
            number = self._rows.get(lease.token)
            if number is None:
                return 0
            rows = first + np.flatnonzero(self._holds[number].slots[first:] == NO_SLOT)
        if len(rows):
            packed = rows.astype("<i4").tobytes()
            self._tell(m.Fetch(0, lease.token, packed, self.welcome.fetch_s))
        return len(rows)

    # reserve → fill → commit

    def reserve(
        self, keys: BlockKeys, form: Form | None = None, group: bytes | None = None
    ) -> Reservation:
        """Reserve slots for the keys that are not held. See `Store.reserve`."""
        number = (form or self.forms(keys.namespace).usual).number
        table = self._table(keys)
        part = m.WHOLE if group is None else keys.namespace.view.part
        said = self._ask(m.Reserve(table[0], number, *table[2:], group or b"", part))
        held = np.zeros(len(keys), dtype=np.bool_)
        indices, slots = np.empty(0, dtype=np.intp), EMPTY
        fill = token = None
        if isinstance(said, m.Reserved) and len(said.held) <= len(keys):
            held[: len(said.held)] = np.frombuffer(said.held, dtype=np.uint8) == 1
            indices = np.frombuffer(said.indices, dtype="<i4").astype(np.intp)
            slots = np.frombuffer(said.slots, dtype="<i4").copy()
            fill, token = said.fill, said.token
            if not self._holds_all(slots, self._sizes[number], NO_SLOT + 1):
                self.lose()  # it is no daemon of ours
                indices, slots = indices[:0], EMPTY
            elif len(slots):
                with self._lock:
                    self._filling.add(said.token)
        return Reservation(
            keys, number, EMPTY, indices, held, slots, EMPTY, 0.0, self._dead, fill, token
        )

    def commit(self, reservation: Reservation, good: Bools | None = None) -> int:
        """Make filled blocks visible to every process. Returns how many are. See `Store.commit`."""
        if good is None:
            good = np.ones(len(reservation), dtype=np.bool_)
        if not self._ended(reservation.token):
            return 0
        return self._count(m.Commit(self._next(), reservation.token, good.tobytes()))

    def abort(self, reservation: Reservation) -> None:
        """Give reserved slots back. Idempotent."""
        if self._ended(reservation.token):
            self._tell(m.Abort(0, reservation.token))

    def widen(self, keys: Sequence[bytes]) -> None:
        """Note blocks that have no room in their usual form: their parts take the spare one."""
        self._tell(m.Widen(0, b"".join(keys)))

    def _ended(self, token: bytes) -> bool:
        """Note that nobody writes a reservation's slots any more. False: that was known."""
        with self._lock:
            known = token in self._filling
            self._filling.discard(token)
            return known

    # Keeping house

    def keep(self, keys: BlockKeys, new: Bools, asked: Retention) -> int:
        """Keep blocks of a save as asked."""
        table = self._table(keys)
        flags = new[: len(table[2]) // m.KEY_BYTES].tobytes()
        return self._count(m.Keep(*table, flags, asked.priority, asked.duration_s, asked.ttl_s))

    def hint(self, keys: BlockKeys, branch: bool, resume_s: float | None) -> int:
        """Say what will become of a prompt."""
        return self._count(m.Hint(*self._table(keys), branch, resume_s))

    def keep_in_memory(self, keys: BlockKeys, duration_s: float | None) -> int:
        """Pin blocks; None: for ever."""
        return self._count(m.Pin(*self._table(keys), duration_s))

    def let_leave(self, keys: BlockKeys) -> int:
        """Take pins away."""
        return self._count(m.Unpin(*self._table(keys)))

    def drop(self, keys: BlockKeys) -> int:
        """Forget blocks everywhere."""
        return self._count(m.Drop(*self._table(keys)), SLOW_S)

    def drop_all(self) -> int:
        """Raise the tenant's epoch; return the new one."""
        return self._count(m.DropAll(self._next()), SLOW_S)

    def squeeze(self, nbytes: int) -> int:
        """Evict until so many bytes of memory are used."""
        return self._count(m.Squeeze(self._next(), nbytes), SLOW_S)

    def is_clean(self) -> bool:
        """Say whether all that is committed has been written below; so if nobody answers."""
        said = self._ask(m.IsClean(self._next()))
        return not isinstance(said, m.Count) or said.count == 1

    def stats(self) -> dict[str, int]:
        """Return the daemon's counts of this tenant."""
        said = self._ask(m.Stats(self._next()), SLOW_S)
        return said.counts if isinstance(said, m.Facts) else {}

    def observe(self, namespace: Namespace, position: int, tokens: int, seconds: float) -> None:
        """Tell what computing took."""
        space = self._spaces[namespace.number].number
        self._ask(m.Observe(self._next(), space, position, tokens, seconds))

    def settled(self, session: bytes) -> bool:
        """Say that nothing of an earlier session is in use any more; whether it was heard."""
        return isinstance(self._ask(m.Settled(self._next(), session)), m.Done)

    @property
    def in_use(self) -> bool:
        """Whether a transfer may still read or write the memory."""
        with self._lock:
            pinned = any(hold.pinned for hold in self._holds.values())
            return pinned or bool(self._filling)

    # The second connection, and the end

    def hear(self) -> None:
        """Wait for something that nobody has asked for here, for a moment; see to it.

        Raises Lost. One thread calls this.
        """
        assert self._ear is not None
        said = self._ear.hear()
        self._tell(None)
        while self._dead:
            token = self._dead.popleft()
            if self._ended(token):
                self._tell(m.Abort(0, token))
        if isinstance(said, m.Fetched):
            self._arrived(said)
        elif isinstance(said, m.Expired):
            self._expired(said.token)

    def _arrived(self, said: m.Fetched) -> None:
        with self._lock:
            waiting = self._waiting.pop(said.number, None)
            if waiting is None:
                return
            hold, rows = waiting.hold, waiting.rows
            if len(said.slots) == len(said.generations) == 4 * len(rows):
                slots = np.frombuffer(said.slots, dtype="<i4")
                if self._holds_all(slots, max(self._sizes.values()), NO_SLOT):
                    # New arrays: loads may be looking at the old ones.
                    hold.slots, hold.generations = hold.slots.copy(), hold.generations.copy()
                    hold.slots[rows] = slots
                    hold.generations[rows] = np.frombuffer(said.generations, dtype="<u4")
        waiting.ready()

    def _expired(self, token: bytes) -> None:
        with self._lock:
            number = self._rows.get(token)
            if number is None:
                return  # a reservation's: commit or abort will come
            self._holds[number].over = True
            gone = self._gone(number)
        if gone:
            self._tell(m.Release(0, gone))

    def lose(self) -> None:
        """End the connections; whoever waits is told. Idempotent, from any thread."""
        with self._lock:
            self.lost = True
            waiting, self._waiting = list(self._waiting.values()), {}
        self._channel.end()
        if self._ear is not None:
            self._ear.end()
        for each in waiting:
            each.ready()

    def close(self) -> None:
        """Say good-bye, where nothing is in use any more, and give the sockets back."""
        if not self.lost and not self.in_use:
            self._ask(m.Bye(self._next()))
        self.lose()
        self.forsake()

    def forsake(self) -> None:
        """Give the sockets back without a word: after a fork, in the child."""
        self.lost = True
        self._channel.close()
        if self._ear is not None:
            self._ear.close()

    # Inside

    def _next(self) -> int:
        return next(self._counter) % 0xFFFF_FFFF + 1

    def _table(self, keys: BlockKeys) -> tuple[int, int, bytes, int, bytes]:
        """Return a request's number, and a table of keys as messages have it."""
        space = self._spaces[keys.namespace.number].number
        data = keys.data[: m.KEYS_MAX * m.KEY_BYTES]
        return self._next(), space, data, keys.position, keys.parent

    def _ask(self, message: m.Message, timeout_s: float | None = None) -> m.Answer | None:
        """Ask; None where the daemon is away, or does not answer in time: it is away from now."""
        if self.lost:
            return None
        try:
            return self._channel.ask(message, timeout_s)
        except Lost:
            self.lose()
            return None

    def _tell(self, message: m.Message | None, *, later: bool = False) -> None:
        if not self.lost:
            try:
                self._channel.tell(message, later=later)
            except Lost:
                self.lose()

    def _count(self, message: m.Message, timeout_s: float | None = None) -> int:
        said = self._ask(message, timeout_s)
        return said.count if isinstance(said, m.Count) else 0


class Asked:
    """What loads ask of Fetches: here all that is not in memory is claimed by the daemon."""

    share_bytes = 0

    def __init__(self, proxy: Proxy, alarms: Fetches) -> None:
        self._proxy = proxy
        self.alarm = alarms.alarm

    def claim(self, ids: Int32s) -> Bools:
        """Say that others fetch these."""
        return np.zeros(len(ids), dtype=np.bool_)

    def join(self, ids: Int32s, ready: Ready) -> None:
        """Have them fetched, and call `ready` when that is over."""
        self._proxy.fetch(ids, ready)

    def begin(self, nbytes: int, deadline: float, start: Start) -> None:
        """Let no read begin here."""
        start(False)

    def end(self, nbytes: int) -> None:
        """Take nothing back."""

    def free(self, ids: Int32s) -> None:
        """Take nothing back."""


def _rows(ids: Int32s) -> Int32s:
    rows: Int32s = ids & np.int32((1 << ROW_BITS) - 1)
    return rows
