"""The engine: the one place that puts arena, store, tiers and transfers together.

Save: reserve → gather and digest into slots → commit → written to the tier below, behind.
Load: pin the lease's blocks → verify and scatter; those in a tier are read into slots first.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from kvengine import arrays
from kvengine.adapters.array import Export, export
from kvengine.arena import Arena
from kvengine.cache import PagedCache
from kvengine.codec import EXACT, forms_of
from kvengine.compiled import Int32s, Int64s
from kvengine.config import Config, Objects, Valkey
from kvengine.errors import ClosedError, ConfigError, LayoutError
from kvengine.fetches import Fetches, Once
from kvengine.frame import PAGE_BYTES
from kvengine.kernels import launch
from kvengine.keys import FORMAT_VERSION, BlockKeys, Identity, Namespace
from kvengine.layout import Layout
from kvengine.lease import Bools, Lease
from kvengine.lifetime import watch
from kvengine.load import Load, loading
from kvengine.metrics import Metrics
from kvengine.pin import Pin
from kvengine.pins import SOFT_SHARE, Pins
from kvengine.plan import MEMORY, Costs, check_prefill
from kvengine.policy import Request
from kvengine.policy.named import policy_of
from kvengine.policy.retention import Retained
from kvengine.pools import PoolMatch, match_pools
from kvengine.prefetch import PREFETCH_BYTES, prefetch
from kvengine.record import RECORD_BYTES, Recorder
from kvengine.retention import Retention, asked_for, check_hint, check_pin, check_seconds
from kvengine.save import Save, group_of, saving
from kvengine.seal import KEPT_BYTES, Sealer
from kvengine.shadow import Computing, Shadowed, Shadows
from kvengine.store import EMPTY, Store, exercise
from kvengine.tenants import DEFAULT, DataKeys, Tenants
from kvengine.tiers import Tier
from kvengine.tiers.disk import DiskTier
from kvengine.tiers.finder import NOWHERE, Finder
from kvengine.tiers.objects import ObjectsClient
from kvengine.tiers.remote import Client, RemoteTier
from kvengine.tiers.valkey import ValkeyClient
from kvengine.transfer import Transfer, Transfers
from kvengine.writer import Writer

CLOSE_S = 30.0
PIN_POLL_S = 0.1
FETCH_SHARE = 4  # a quarter of memory is lent to reads from tiers at a time


class Engine:
    """A KV cache for one process: memory, and a directory below it where one is given.

    All verbs take tables and may be called from any thread. Cache faults never raise: they are
    misses, refusals and counters. After a fork, the child's engine is detached: every verb misses.
    A context manager; `close` writes what is committed to the tier and gives everything back.
    """

    def __init__(
        self,
        config: Config,
        memory: Arena | None = None,
        tenant: str = DEFAULT,
        tenants: Tenants | None = None,
    ) -> None:
        """Open an engine of one process; or, over the `memory` that it shares, of one of `tenants`.

        Then whoever serves it sees to the deadlines of leases.
        """
        self.config = config
        self.tenant = tenant
        self.metrics = Metrics()
        self._closed = False
        self._detached = False
        arena = memory or Arena(config.memory_bytes)
        self._store = Store(
            arena,
            policy_of(config.policy),
            self.metrics,
            time.monotonic,
            config.lease_s if memory is None else math.inf,
            config.reservation_s,
        )
        self._tiers: list[Tier] = []
        kept = None if config.disk is None else Path(config.disk.path) / "tenants.json"
        self._data_keys = DataKeys(lambda: tenants or Tenants(kept, config.secret), tenant)
        try:
            self._open_tiers()
            self._tenants = self._data_keys.tenants
            for tier in self._tiers:
                self._store.attach(tier)
            self._transfers = Transfers(config.threads, self._failed)
        except BaseException:
            for tier in self._tiers:
                tier.close()
            raise
        self._writers = [
            Writer(self._store, tier, number, *self._marks(tier))
            for number, tier in enumerate(self._tiers)
        ]
        self._fetches = Fetches(arena.nbytes // FETCH_SHARE, time.monotonic, self._failed)
        self._finder = Finder(self._tiers, time.monotonic, config.find_s)
        self._costs = Costs()
        self._recorder: Recorder | None = None
        self._shadows: Shadows | None = None  # once their loops are compiled
        self._pins = Pins(arena.nbytes // SOFT_SHARE, time.monotonic, self._store.unpin)
        self._ttl_s: dict[int, float] = {}  # of namespaces, by number
        self._pin: Pin | None = None
        self._ready = threading.Event()
        self._populating = threading.Thread(
            target=self._prepare, name="kvengine-prepare", daemon=True
        )
        self._leave = watch(self)
        self._populating.start()
        if config.record:
            try:
                self.record(config.record)
            except ConfigError:
                self.close()
                raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Names

    def namespace(
        self,
        *,
        model: str,
        layout: Layout,
        revision: str = "",
        kv_dtype: str = "",
        adapter: str = "",
        media: str = "",
        salt: str = "",
        fidelity: str = EXACT,
        positional: str = "rope",
        pool: str = "target",
        source: str = "tokens",
        ttl_s: float | None = None,
    ) -> Namespace:
        """Return where keys of one model (adapter, salt …) come from.

        Everything that determines K/V besides the tokens is named here: two callers share blocks
        only where all of it is equal. `kv_dtype` is the layout's dtype where left out. `source`
        names the serving engine's own hash where keys are made of it. `fidelity` is "exact", or
        "int8", "fp8", "int4" or "rot4": what is loaded then is close to what was saved, blocks
        take a half or a quarter of the memory, and none of them answers another fidelity's key.
        After `ttl_s` from their save its blocks leave memory and tiers, used or not; the last one
        given for a namespace counts. Raises LayoutError for a layout that the fidelity cannot take,
        ConfigError for a `ttl_s` that is no time.
        """
        self._alive()
        smaller = self.config.lossless and launch.available("numba")  # else copying is far faster
        identity = {
            "model": model,
            "revision": revision,
            "adapter": adapter,
            "media": media,
            "salt": salt,
            "kv_dtype": kv_dtype or layout.dtype,
            "fidelity": fidelity,
            "positional": positional,
            "pool": pool,
            "source": source,
        }
        return self.space(identity, layout, smaller, ttl_s)[0]

    def cache(
        self,
        namespace: Namespace,
        arrays: Sequence[object],
        *,
        writable: bool = True,
    ) -> PagedCache:
        """Check the caller's arrays once, for many calls of `save` and `load`.

        arrays: one item a layer, as kvengine.cache.PagedCache says; of `namespace.part` its layers
        and heads. Raises LayoutError.
        """
        return PagedCache(namespace.view.layout, arrays, writable)

    # What is held

    def probe(self, keys: BlockKeys) -> int:
        """Count the leading blocks that are held, here or in a tier. Takes nothing."""
        if self._gone(keys):
            return 0
        if not self._finder:
            return self._store.probe(keys)
        held = self._held(keys)
        return len(held) if held.all() else int(held.argmin())

    def contains(self, keys: BlockKeys) -> Bools:
        """Say for each key whether its block is held. Takes nothing."""
        if self._gone(keys):
            return np.zeros(len(keys), dtype=np.bool_)
        return self._held(keys)

    def match(
        self, keys: BlockKeys, *, split: bool = False, request: Request | None = None
    ) -> Lease:
        """Hold the leading blocks that are here or in a tier, for a `load`.

        The lease's `worth` names the blocks to load, where `observe_prefill` has said what
        computing takes; with `split` it may leave out the first ones as well: compute them while
        the others arrive. `request` tells the policy what is known of the one that asks: how long
        its output was, how it stopped.

        Release the lease (or leave its `with` block) when the load has been enqueued: the transfer
        keeps its own hold. A lease that nobody releases ends after `lease_s`.
        """
        if self._gone(keys):
            return Lease(keys, np.empty(0, dtype=np.int32), 0, 0.0, self._store.release)
        self._pins.expire()
        if self._recorder is not None:
            self._recorder.asked(keys, request)
        lease = self._store.match(keys, self._found(keys), request)
        self.metrics.add("lookup_blocks", len(keys))
        if lease.in_memory:
            self.metrics.add("hit_blocks", lease.in_memory, tier="memory")
        away = EMPTY
        if lease.blocks > lease.in_memory:
            away = self._store.served(lease.ids[lease.in_memory :])
            for number in set(away.tolist()):
                name = "memory" if number < 0 else self._tiers[number].name
                self.metrics.add("hit_blocks", int((away == number).sum()), tier=name)
        if lease.blocks and self._costs.active:
            homes = np.full(lease.blocks, MEMORY, dtype=np.int32)
            homes[lease.in_memory :] = away
            self._plan(lease, homes, split)
        if self._shadows is not None:
            self._shadows.asked(
                keys,
                lease.in_memory,
                lease.blocks,
                self._pages(keys.namespace),
                request,
                self._computing(keys.namespace),
                time.monotonic(),
            )
        return lease

    def match_pools(
        self, tables: Sequence[BlockKeys], *, request: Request | None = None
    ) -> PoolMatch:
        """Hold the longest start of a prompt that all pools of a model can go on from.

        tables: the prompt's keys in each pool, a namespace each, whose layouts say what it needs
        (`Layout.attention`). The match says how many tokens that is, and has each pool's leases;
        release it as a lease. Raises LayoutError for keys that do not begin the prompt.
        """
        return match_pools(self, tables, request)

    def observe_prefill(
        self, namespace: Namespace, position: int, tokens: int, seconds: float
    ) -> None:
        """Tell how long a model took to compute `tokens` of one prompt after `position` others.

        From the first of these on `match` says what is worth fetching; tiers are measured by the
        engine itself. Raises ConfigError for what cannot be.
        """
        check_prefill(position, tokens, seconds)
        self._costs.computed(_model(namespace), position, tokens, seconds)

    # Moving

    def save(
        self,
        keys: BlockKeys,
        caches: PagedCache | Sequence[object],
        block_table: object = None,
        slot_mapping: object = None,
        *,
        retention: Retention | Sequence[Retention] = (),
        fill: bytes | None = None,
    ) -> Transfer:
        """Begin to store blocks that the engine does not hold yet; return at once.

        block_table: int[len(keys)], where each block lies in `caches`; or slot_mapping:
        int[len(keys) * block_tokens], where each token lies. The blocks must not change until the
        Transfer is done. What finds no room is refused and counted. `retention` says how to keep
        them, one for each range of tokens; blocks that were held before are only kept better by it,
        or left alone where nobody had used retention when they came.

        Keys of `namespace.part` save a rank's parts of the blocks. `fill` names the fill: the same
        bytes from all ranks of one model for one step of one request. A block is there when all of
        them have saved their parts, and the last one's Transfer says so; if one does not within
        `reservation_s`, or has no room for its part, it is given up and counted. Raises LayoutError
        for arrays or tables that do not fit, or parts without a `fill`.
        """
        transfer, cache, table, mapping = saving(keys, caches, block_table, slot_mapping)
        group = group_of(keys, fill)
        self._pins.expire()
        if not len(keys) or self._gone(keys) or not self._transfers.begin(transfer):
            return transfer.refuse()
        if self._costs.active and self._tiers:
            self._spare(keys.namespace)
        if self._shadows is not None:
            self._shadows.saved(keys, self._pages(keys.namespace), time.monotonic())
        parts = (self._store, self._transfers, self._finder, self.metrics, self.saved)
        asked = self._asked(keys.namespace, retention)
        Save(*parts, transfer, keys, cache, table, mapping, asked, group).start()
        return transfer

    def load(
        self,
        lease: Lease,
        caches: PagedCache | Sequence[object],
        block_table: object = None,
        slot_mapping: object = None,
        first: int = 0,
        timeout_s: float | None = None,
    ) -> Transfer:
        """Begin to fill the caller's cache with leased blocks; return at once.

        block_table: int[k], where blocks first..first+k of the lease go; or slot_mapping:
        int[k * block_tokens]. Only blocks that the Transfer calls good hold verified bytes; the
        others are to be recomputed. What a tier has not given after `timeout_s` (if None, the
        setting fetch_s) is not good. Blocks of the lease that follow are read ahead. Keys of
        `namespace.part` load some layers and heads, whoever has saved them. Raises LayoutError for
        arrays or tables that do not fit.
        """
        transfer, cache, table, mapping = loading(lease, caches, block_table, slot_mapping, first)
        count = len(transfer.good)
        if not count or self._gone(lease.keys) or not self._transfers.begin(transfer):
            return transfer.refuse()
        ids, slots, numbers = self._store.pin(lease, first, count)
        if not len(ids):
            return transfer.refuse()
        keys = lease.keys[first : first + count]
        deadline = time.monotonic() + (self.config.fetch_s if timeout_s is None else timeout_s)
        if self._costs.active:
            homes = self._store.served(ids)
            transfer.then = partial(self._loaded, keys, homes, time.monotonic())
        parts = (self._store, self._transfers, self._tiers, self._fetches, deadline)
        Load(*parts, transfer, keys, ids, numbers, cache, table, mapping).start(slots)
        if first + count < lease.blocks:
            self.prefetch(lease, first + count)
        return transfer

    def prefetch(self, lease: Lease, first: int = 0) -> int:
        """Begin to read leased blocks from tiers into memory, from `first` on, ahead of a load.

        A bounded number, where memory has room for them. Returns how many.
        """
        if not self._tiers or self._gone(lease.keys) or not 0 <= first < lease.blocks:
            return 0
        pinned = self._store.pin(lease, first, lease.blocks - first)
        deadline = time.monotonic() + self.config.fetch_s
        return prefetch(self._store, self._tiers, self._fetches, deadline, pinned)

    # Arrays that are no K/V: embeddings of prompts, sentences, images

    def save_array(
        self,
        name: str | bytes,
        array: object,
        *,
        model: str,
        revision: str = "",
        adapter: str = "",
        salt: str = "",
        ttl_s: float | None = None,
    ) -> bool:
        """Store an array under a name and what has computed it. Returns whether it is held now.

        name: text or bytes that change with the content, such as a digest of the text or image that
        was embedded. array: of any framework, dtype and shape, in one run of host memory; its bytes
        have been taken when this returns. `model` … `salt` as for `namespace`. After `ttl_s` it is
        a miss; a later save may lengthen that. Raises LayoutError for an array or name that cannot
        be kept, ConfigError for a `ttl_s` that is no time.
        """
        check_seconds("ttl_s", ttl_s)
        source = arrays.Source(model, revision, adapter, salt)
        named = arrays.Named(self, source, name)
        found = arrays.looked_at(array)
        return not self._away() and named.save(found, ttl_s, time.time())

    def load_array(
        self,
        name: str | bytes,
        *,
        model: str,
        revision: str = "",
        adapter: str = "",
        salt: str = "",
    ) -> Export | None:
        """Return a verified copy of an array that `save_array` has stored; None for a miss.

        It is in new memory, for any framework: torch.from_dlpack(found), np.from_dlpack(found),
        jax.dlpack.from_dlpack(found). Raises LayoutError for a name that is none.
        """
        named = arrays.Named(self, arrays.Source(model, revision, adapter, salt), name)
        found = None if self._away() else named.load(time.time())
        return None if found is None else export(found)

    # Keeping house

    def pin(self, keys: BlockKeys, duration_s: float | None = None, *, hard: bool = False) -> int:
        """Keep the leading blocks that are in memory there. Returns how many are pinned.

        A soft pin lasts `duration_s` from now, is not renewed by reads, and all of them take at
        most a quarter of memory: what is beyond is not pinned. A `hard` one lasts until `unpin`;
        where all of memory is pinned, saves are refused and counted. Raises ConfigError for a soft
        pin without a duration, or a hard one with one.
        """
        check_pin(duration_s, hard)
        if self._gone(keys):
            return 0
        with self._store.match(keys) as lease:
            entries, _, _ = self._store.pin(lease, 0, lease.in_memory)
            held = _listed(keys)[: len(entries)]
            nbytes = self._store.frame_bytes(keys.namespace.number)
            return self._pins.add(held, entries, nbytes, duration_s)

    def unpin(self, keys: BlockKeys) -> int:
        """Take pins away, soft and hard. Returns how many there were."""
        return 0 if self._away() else self._pins.remove(_listed(keys))

    def hint(
        self,
        keys: BlockKeys,
        *,
        session_end: bool = False,
        branch_done: bool = False,
        expect_resume_in: float | None = None,
        prefetch: bool = False,
    ) -> int:
        """Tell what will become of a prompt. Returns how many of its blocks the hint reached.

        Exactly one of: `session_end` (its blocks leave before all others), `branch_done` (only
        those at its end that no other prompt continues), `expect_resume_in` seconds (they leave
        after all others until then; with `prefetch` those in tiers are read ahead now). A use of a
        block ends its hint. Blocks that are not in memory, or came before anybody used retention,
        are counted and left alone. Raises ConfigError for contradictory hints.
        """
        check_hint(session_end, branch_done, expect_resume_in, prefetch)
        if self._gone(keys):
            return 0
        if prefetch:
            with self._store.match(keys, self._found(keys)) as lease:
                self.prefetch(lease, min(lease.in_memory, max(0, lease.blocks - 1)))

        def tell(policy: Retained, entries: Int32s, now: float) -> int:
            if expect_resume_in is not None:
                return policy.expect(entries, now + expect_resume_in, now)
            return policy.end(entries, now, branch=branch_done)

        known = self._store.retain(keys, tell)
        self.metrics.add("hint_unknown_blocks", len(keys) - known)
        return known

    def record(self, path: str | Path | None, size_bytes: int = RECORD_BYTES) -> None:
        """Write down from now on what `match` is asked for, as a trace; None: no more.

        Hashes and times, never a token. The file at `path` is begun anew; it and the one before it
        (NAME.1) take at most `size_bytes`. Raises ConfigError where the file cannot be made.
        """
        before, self._recorder = self._recorder, None
        if before is not None:
            before.close()
        if path is not None:
            self._alive()
            try:
                self._recorder = Recorder(Path(path), size_bytes, time.monotonic)
            except OSError as error:
                raise ConfigError(f"record: {path} cannot be made: {error.strerror}") from None

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until every committed block is in the tier below, or given up. False: too late."""
        if self._away():
            return True
        self._flush()
        return self._store.wait_clean(timeout_s)

    def drop(self, keys: BlockKeys) -> int:
        """Forget blocks everywhere. Returns how many there were."""
        if self._gone(keys):
            return 0
        self._finder.forget(_listed(keys))
        self._pins.remove(_listed(keys))
        return self._store.drop(keys)

    def drop_all(self) -> int:
        """Make every block of this tenant unreachable, in O(1); returns the new epoch.

        Keys of namespaces made before miss from now on: ask for the namespaces again.
        """
        self._alive()
        return self._tenants.raise_epoch(self.tenant)

    def rotate_key(self) -> int:
        """Seal blocks with a new data key from now on; those sealed before can still be read.

        Returns its number. Raises ConfigError where the key comes of a secret that was given.
        """
        self._alive()
        return self._tenants.rotate_key(self.tenant)

    def drop_keys(self) -> int:
        """Forget the data keys: no sealed block of this tenant can be read again, in any tier.

        What is in memory stays there (see `drop_all`). Returns how many keys. Raises ConfigError
        where the key comes of a secret that was given.
        """
        self._alive()
        return self._tenants.drop_keys(self.tenant)

    def squeeze(self, nbytes: int) -> int:
        """Evict until at most `nbytes` of memory are used; returns how many were given up.

        Blocks that are leased, or not yet written to the tier below, stay.
        """
        return 0 if self._away() else self._store.squeeze(nbytes)

    def stats(self) -> dict[str, int]:
        """Return counts of blocks and bytes by place, hits, misses, and what went wrong."""
        if self._away():
            return {}
        stats = self._store.stats()
        stats["tier_bytes"] = sum(tier.nbytes for tier in self._tiers)
        self.metrics.set("blocks", stats["memory_blocks"], tier="memory")
        self.metrics.set("bytes", stats["memory_bytes"], tier="memory")
        for tier in self._tiers:
            self.metrics.set("blocks", stats[f"{tier.name}_blocks"], tier=tier.name)
            if not tier.remote:
                self.metrics.set("bytes", tier.nbytes, tier=tier.name)
        for name in (
            "lookup_blocks",
            "hit_blocks",
            "saved_blocks",
            "save_refused_blocks",
            "evicted_blocks",
            "demoted_blocks",
            "fetched_blocks",
            "corrupt_blocks",
            "tier_failures",
        ):
            stats[name] = int(self.metrics.get(name))
        for policy, seen in self.shadows().items():
            stats["shadow_lookup_blocks"] = seen.lookup_blocks
            stats[f"shadow_{policy}_hit_blocks"] = seen.hit_blocks
            stats[f"shadow_{policy}_saved_prefill_s"] = int(seen.saved_prefill_s)
        return stats

    def shadows(self) -> dict[str, Shadowed]:
        """Return what each policy of the setting `shadow` would have hit so far, by its name.

        Under "live" stands what memory has hit, of the same sample. Empty without that setting, and
        until the loops of the policies are compiled.
        """
        return {} if self._shadows is None else self._shadows.seen()

    def warm(self, timeout_s: float | None = None) -> bool:
        """Wait until kernels are loaded and the arena's memory is backed. False: not in time."""
        self._populating.join(timeout_s)
        return not self._populating.is_alive()

    def check(self) -> None:
        """Raise AssertionError where the engine's books do not balance. For tests, at rest."""
        self._store.check()

    def close(self) -> None:
        """Write what is committed to the tier, end the threads, let go of the directory.

        Waits at most about a minute. Idempotent. In a forked child it only lets go.
        """
        if self._closed or self._detached:
            return
        self._closed = True
        atexit.unregister(self._leave)
        self.record(None)
        self._store.arena.stop()
        self._populating.join()
        self._transfers.close(CLOSE_S)
        self._flush()
        self._store.wait_clean(CLOSE_S)
        for writer in self._writers:
            writer.stop()
        for tier in self._tiers:
            tier.close()
        self._fetches.close()  # after reads have ended, or a tier that hangs has been left
        if self._pin is not None:
            self._pin.close(CLOSE_S)

    def detach(self) -> None:
        """After a fork, in the child: let go of files and locks; every verb misses from now on."""
        if self._detached or self._closed:
            return
        self._detached = True
        self._recorder = self._shadows = None  # its file and their lock are the parent's
        self.metrics = Metrics()  # a lost thread may hold the locks of the other
        self._store.detach()
        self._transfers.detach()
        self._finder.detach()
        self._pins.detach()
        self._fetches.detach()
        if self._pin is not None:
            self._pin.detach()
        for tier in self._tiers:
            tier.detach()

    # For whoever serves other processes from this engine

    @property
    def store(self) -> Store:
        """What is held. Those who serve it take and give back leases and reservations there."""
        return self._store

    @property
    def tenants(self) -> Tenants:
        """Whose blocks there may be."""
        return self._tenants

    @property
    def asks(self) -> bool:
        """Whether a look-up may wait for the answer of a remote tier."""
        return bool(self._finder)

    def away(self) -> list[str]:
        """Name the tiers that fail and are left alone for now."""
        return [tier.name for tier in self._tiers if tier.away]

    def is_current(self, namespace: Namespace) -> bool:
        """Say whether a namespace is of the tenant's and the model's epoch: others hold nothing."""
        identity = namespace.identity
        return self._tenants.is_current(self.tenant, identity.model, identity.epoch)

    def memory_bytes(self) -> int:
        """Return how many bytes of memory blocks take."""
        return self._store.arena.taken_pages * PAGE_BYTES

    def pressed(self) -> int:
        """Count the blocks that had to go, or were refused, for want of memory."""
        return int(self.metrics.get("evicted_blocks") + self.metrics.get("save_refused_blocks"))

    def limit(self, nbytes: int) -> int:
        """Use at most so many bytes of memory from now on; returns how many are in use still."""
        return self._store.limit(nbytes)

    def space(
        self, identity: Mapping[str, str], layout: Layout, smaller: bool, ttl_s: float | None
    ) -> tuple[Namespace, list[int]]:
        """Return a namespace of this tenant, and the numbers of its forms.

        identity: all of its fields that are texts, but for the tenant. smaller: as `forms_of` has
        it. Raises LayoutError, ConfigError.
        """
        check_seconds("ttl_s", ttl_s)
        forms = forms_of(identity["fidelity"], layout, smaller=smaller)
        made = Identity(
            format_version=FORMAT_VERSION,
            tenant=self.tenant,
            layout=layout.digest(),
            epoch=self._tenants.epoch(self.tenant, identity["model"]),
            **dict(identity) | {"fidelity": forms.usual.fidelity},
        )
        space = self._store.namespace(made, layout, self._tenants.secret(self.tenant), forms)
        if ttl_s is not None:
            self._ttl_s[space.number] = ttl_s
        return space, [form.number for form in self._store.forms(space)]

    def keep(self, keys: BlockKeys, new: Bools, asked: Retention) -> int:
        """Keep blocks of a save as asked; new: those that it brought. Returns how many."""
        return self._store.keep(keys, new, asked)

    def saved(self, keys: BlockKeys, count: int) -> None:
        """After a save of so many of the blocks: write them below, make room for as many."""
        self._pump()
        self._store.make_room(keys.namespace, count)

    def committed(self, keys: BlockKeys, count: int) -> None:
        """After a commit of so many of the blocks of another process."""
        self.metrics.add("saved_blocks", count)
        if self._shadows is not None:
            self._shadows.saved(keys, self._pages(keys.namespace), time.monotonic())
        self.saved(keys, len(keys))

    def fetch(self, ids: Int32s, timeout_s: float, ready: Callable[[], None]) -> None:
        """Read leased blocks into memory; call `ready` once, from any thread, when that is over.

        Those that others are reading already are waited for.
        """
        deadline = time.monotonic() + timeout_s
        alarm = self._fetches.alarm(deadline, once := Once(ready))
        self._ahead(ids, deadline, None)

        def over() -> None:
            alarm.cancel()
            once()

        self._fetches.join(ids, over)

    def ahead(self, ids: Int32s) -> None:
        """Read some of these leased blocks into memory, where it has room, ahead of need."""
        self._ahead(ids, time.monotonic() + self.config.fetch_s, PREFETCH_BYTES)

    def _ahead(self, ids: Int32s, deadline: float, nbytes_max: int | None) -> None:
        self._store.repin(ids)
        pinned = (ids, *self._store.places(ids))
        prefetch(self._store, self._tiers, self._fetches, deadline, pinned, nbytes_max)

    # Inside

    def _open_tiers(self) -> None:
        """Open the tiers below memory, the fastest first."""
        disk, valkey, objects = self.config.disk, self.config.valkey, self.config.objects
        sealed = sum(each.encrypt for each in (disk, valkey, objects) if each is not None)
        kept_bytes = min(KEPT_BYTES, self.config.memory_bytes // 8) if sealed > 1 else 0
        seal = Sealer(self._data_keys, kept_bytes) if sealed else None
        if disk is not None:
            tier = DiskTier(
                Path(disk.path),
                disk.size_bytes,
                self.metrics,
                partial(self._store.dropped, len(self._tiers)),
                segment_bytes=disk.segment_bytes,
                threads=self.config.io_threads,
                durable=disk.durable,
                seal=seal if disk.encrypt else None,
            )
            self._tiers.append(tier)
        if valkey is not None:
            self._open_remote(ValkeyClient(valkey), valkey, valkey.prefix, seal)
        if objects is not None:
            self._open_remote(ObjectsClient(objects), objects, "", seal)

    def _open_remote(
        self, client: Client, config: Valkey | Objects, prefix: str, seal: Sealer | None
    ) -> None:
        tier = RemoteTier(
            client,
            self.metrics,
            partial(self._lost, len(self._tiers)),
            prefix=prefix,
            threads=config.connections,
            timeout_s=config.timeout_s,
            seal=seal if config.encrypt else None,
        )
        self._tiers.append(tier)

    def _lost(self, number: int, keys: Sequence[bytes]) -> None:
        """Note that a remote tier has lost blocks that it was said to hold."""
        self._finder.forget(keys)
        self._store.dropped(number, keys)

    def _prepare(self) -> None:
        """Have compiled kernels and memory ready before the first save asks for them."""
        try:
            launch.choose(None)
            launch.coders(None)
            for name in dict.fromkeys((self.config.policy, *self.config.shadow)):
                exercise(partial(policy_of, name))
            if self.config.shadow:
                pages = self._store.arena.nbytes // PAGE_BYTES
                self._shadows = Shadows(self.config.shadow, pages, self.metrics)
        finally:
            self._ready.set()
        if self.config.pin and not self._closed:
            self._pin = Pin(self._store.arena, self.metrics)
            # Who touches memory first places it: that is a thread near the device.
            while not (self._closed or self._pin.over(PIN_POLL_S)):
                pass
        if self.config.populate:
            self._store.arena.populate()

    def settle(self) -> None:
        """Before a fork: let kernels be loaded first, for at most CLOSE_S.

        A child would wait for ever for the lock of a module that a thread, lost to it, imports.
        """
        if threading.current_thread() is not self._populating:
            self._ready.wait(CLOSE_S)

    def _alive(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed: open another with kvengine.open")
        if self._detached:
            raise ClosedError("the engine belongs to the process that forked: open one here")

    def _away(self) -> bool:
        return self._closed or self._detached

    def _gone(self, keys: BlockKeys) -> bool:
        """Whether nothing is held under these keys: the engine is away, or their epoch is over."""
        if self._away():
            return True
        if not self._store.knows(keys.namespace):
            raise LayoutError(
                f"these keys are of {keys.namespace!r}, which another engine has made: ask this "
                "one with engine.namespace(...)"
            )
        return not self.is_current(keys.namespace)

    def _failed(self, error: Exception) -> None:
        self.metrics.add("tier_failures", 1, tier="memory")

    def _asked(
        self, namespace: Namespace, given: Retention | Sequence[Retention]
    ) -> Sequence[Retention]:
        """Return how to keep what is saved; from the first that asks for anything on, heed it."""
        asked = asked_for(given, self._ttl_s.get(namespace.number))
        if asked:
            self._store.retaining()
        return asked

    def _plan(self, lease: Lease, homes: Int32s, split: bool) -> None:
        """Say which blocks of a lease are sooner fetched than computed."""
        namespace = lease.keys.namespace
        nbytes = np.full(lease.blocks, self._store.frame_bytes(namespace.number), dtype=np.int64)
        tokens, position = namespace.layout.block_tokens, lease.keys.position
        plan = self._costs.plan(_model(namespace), homes, nbytes, tokens, position, split)
        lease.worth = range(plan.first, plan.stop)
        self.metrics.add("plan_decisions", 1, reason=plan.reason)

    def _spare(self, namespace: Namespace) -> None:
        """Write no blocks to tiers from which none would be fetched."""
        about = (self._store.frame_bytes(namespace.number), namespace.layout.block_tokens)
        bits = sum(
            1 << number
            for number in range(len(self._tiers))
            if not self._costs.pays(_model(namespace), number, *about)
        )
        self._store.spare(namespace.number, bits)

    def _loaded(self, keys: BlockKeys, homes: Int32s, start: float, good: Bools) -> None:
        """Measure a load that has ended, where all of it came from memory and one tier at most."""
        seconds, namespace = time.monotonic() - start, keys.namespace
        tiers = sorted(set(homes.tolist()) - {MEMORY}) or [MEMORY]
        if good.all() and len(tiers) == 1:
            count = int((homes == tiers[0]).sum())
            nbytes = count * self._store.frame_bytes(namespace.number)
            self._costs.fetched(tiers[0], nbytes, seconds)
        edges: Int64s = keys.position + np.arange(len(keys) + 1)
        computing = self._costs.prefill_s(_model(namespace), edges * namespace.layout.block_tokens)
        if computing is not None:
            saved = float(np.diff(computing)[good].sum()) - seconds
            self.metrics.add("saved_prefill_seconds", max(0.0, saved))

    def _marks(self, tier: Tier) -> tuple[int, int]:
        """Return how many bytes of memory may wait for a tier before it is written to, and fast.

        Others ask a remote one for what was saved here: it is written to at once.
        """
        disk, nbytes = self.config.disk, self._store.arena.nbytes
        if tier.remote or disk is None:
            return 0, 0
        return int(disk.clean_low * nbytes), int(disk.clean_high * nbytes)

    def _pages(self, namespace: Namespace) -> int:
        """Return how many pages of memory a block takes."""
        return self._store.arena.pages_of(self._store.frame_bytes(namespace.number))

    def _computing(self, namespace: Namespace) -> Computing:
        """Return what computing the first so many blocks of a prompt takes."""
        tokens = namespace.layout.block_tokens

        def until(blocks: Int64s) -> NDArray[np.float64] | None:
            active = self._costs.active
            return self._costs.prefill_s(_model(namespace), tokens * blocks) if active else None

        return until

    def _pump(self) -> None:
        """Give every tier the next committed blocks."""
        for writer in self._writers:
            writer.pump()

    def _flush(self) -> None:
        """Begin to give every tier all committed blocks."""
        for writer in self._writers:
            writer.flush()

    def _held(self, keys: BlockKeys) -> Bools:
        """Say for each key whether its block is held here, or in a tier that was asked."""
        held = self._store.contains(keys)
        found = self._found(keys)
        return held if found is None else held | (found[:, 0] >= 0)

    def _found(self, keys: BlockKeys) -> Int32s | None:
        """Ask the remote tiers for what is not held here.

        Returns int32[n, 2], the number of a tier or -1, and that of the form it holds; None where
        there is no one, or nothing, to ask.
        """
        if not self._finder:
            return None
        lacking = np.flatnonzero(~self._store.contains(keys))
        if not len(lacking):
            return None
        found = np.full((len(keys), 2), NOWHERE, dtype=np.int32)
        numbers = list({form.number: None for form in self._store.forms(keys.namespace)})
        asked = [keys.key(index) for index in lacking.tolist()]
        answers = self._finder.find(asked, [self._store.frame_bytes(n) for n in numbers])
        found[lacking, 0] = answers[:, 0]
        found[lacking, 1] = np.array(numbers, dtype=np.int32)[answers[:, 1]]
        return found


def _listed(keys: BlockKeys) -> list[bytes]:
    return [keys.key(index) for index in range(len(keys))]


def _model(namespace: Namespace) -> tuple[str, bytes]:
    """Return what the cost of computing depends on."""
    return namespace.identity.model, namespace.identity.layout
