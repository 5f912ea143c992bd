"""An engine whose blocks are kept by the daemon of this host: the same verbs as the embedded one.

Saves and loads run here, between the caller's arrays and the daemon's memory, which is mapped; only
their books are the daemon's. While it is away every verb misses at once, and a thread looks for it.
"""

from __future__ import annotations

import atexit
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from kvengine import arrays
from kvengine.adapters.array import Export, export
from kvengine.cache import PagedCache
from kvengine.codec import EXACT, Codec, Forms, forms_of
from kvengine.config import Config, Daemon
from kvengine.errors import AwayError, ClosedError, ConfigError, KVEngineError, LayoutError
from kvengine.fetches import Fetches
from kvengine.kernels import launch
from kvengine.keys import FORMAT_VERSION, BlockKeys, Identity, Namespace
from kvengine.layout import Layout
from kvengine.lease import Bools, Lease
from kvengine.lifetime import watch
from kvengine.load import Load, loading
from kvengine.metrics import Metrics
from kvengine.peer import messages as m
from kvengine.peer.channel import Lost
from kvengine.peer.proxy import Asked, Proxy
from kvengine.plan import check_prefill
from kvengine.policy import Request
from kvengine.pools import PoolMatch, match_pools
from kvengine.record import RECORD_BYTES, Recorder
from kvengine.retention import Retention, asked_for, check_hint, check_pin, check_seconds
from kvengine.save import Save, group_of, saving
from kvengine.store import EMPTY
from kvengine.tiers.finder import Finder
from kvengine.transfer import Transfer, Transfers

CLOSE_S = 30.0
CLEAN_S = 0.005  # between two questions of a flush
BACKOFF_S = 0.05, 2.0  # the first, and the longest


@dataclass(frozen=True, slots=True)
class Named:
    """A namespace that has been asked for: it is opened again wherever the daemon comes back."""

    space: Namespace
    message: m.Open
    codecs: Forms[Codec]


class Client:
    """The engine of `kvengine.open("unix:///run/kvengine/kv.sock")`. See kvengine.engine.Engine.

    Raises AwayError where no daemon answers at first, or it refuses; later on that is a miss.
    """

    def __init__(self, config: Config) -> None:
        assert config.daemon is not None
        self.config = config
        self.metrics = Metrics()
        self._daemon: Daemon = config.daemon
        self._closed = self._detached = False
        self._lock = threading.Lock()
        self._named: dict[int, Named] = {}
        self._numbers: dict[tuple[bytes, bytes, bool], int] = {}
        self._current: dict[int, bool] = {}  # whether a namespace is what the daemon calls it now
        self._ttl_s: dict[int, float] = {}  # of namespaces, by number
        self._old: list[Proxy] = []  # lost ones, until nothing of them is in use
        self._recorder: Recorder | None = None
        self._leaving = threading.Event()
        self._ready = threading.Event()
        try:
            self._proxy = self._connect()
        except (OSError, Lost) as error:
            raise AwayError(
                f"no daemon answers at {self._daemon.socket} ({error}): start one with "
                f"'kvengine serve --socket {self._daemon.socket}'"
            ) from None
        self._transfers = Transfers(config.threads, self._failed)
        self._fetches = Fetches(0, time.monotonic, self._failed)
        self._finder = Finder([], time.monotonic, config.find_s)
        self._preparing = threading.Thread(
            target=self._prepare, name="kvengine-prepare", daemon=True
        )
        self._hearing = threading.Thread(target=self._hear, name="kvengine-client", daemon=True)
        self._leave = watch(self)
        self._preparing.start()
        self._hearing.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def away(self) -> bool:
        """Whether the daemon does not answer: every verb misses until it is back."""
        return self._closed or self._detached or self._proxy.lost

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
        """Return where keys of one model come from. See `Engine.namespace`.

        Raises AwayError while the daemon is away: only it can say what keys are made with.
        """
        self._alive()
        check_seconds("ttl_s", ttl_s)
        smaller = self.config.lossless and launch.available("numba")  # else copying is far faster
        codecs = forms_of(fidelity, layout, smaller=smaller)
        facts = {
            "model": model,
            "revision": revision,
            "adapter": adapter,
            "media": media,
            "salt": salt,
            "kv_dtype": kv_dtype or layout.dtype,
            "fidelity": codecs.usual.fidelity,
            "positional": positional,
            "pool": pool,
            "source": source,
        }
        message = m.Open(0, facts, asdict(layout), smaller, ttl_s)
        with self._lock:
            said = self._proxy.open(message)
            space = self._space(self._proxy, message, layout, said, len(self._named))
            name = (space.digest, space.root, smaller)
            space = replace(space, number=self._numbers.setdefault(name, space.number))
            self._proxy.enter(space, codecs, said)
            self._named[space.number] = Named(space, message, codecs)
            self._current[space.number] = True
            if ttl_s is not None:
                self._ttl_s[space.number] = ttl_s
        return space

    def _space(
        self, proxy: Proxy, message: m.Open, layout: Layout, said: m.Opened, number: int
    ) -> Namespace:
        identity = Identity(
            format_version=FORMAT_VERSION,
            tenant=proxy.welcome.tenant,
            layout=layout.digest(),
            epoch=said.epoch,
            **message.identity,
        )
        return Namespace(identity, layout, number, identity.digest(), said.root)

    def cache(
        self,
        namespace: Namespace,
        arrays: Sequence[object],
        *,
        writable: bool = True,
    ) -> PagedCache:
        """Check the caller's arrays once, for many calls. See `Engine.cache`."""
        return PagedCache(namespace.view.layout, arrays, writable)

    # What is held

    def probe(self, keys: BlockKeys) -> int:
        """Count the leading blocks that are held, here or in a tier. Takes nothing."""
        proxy = self._for(keys)
        return 0 if proxy is None else proxy.probe(keys)

    def contains(self, keys: BlockKeys) -> Bools:
        """Say for each key whether its block is held. Takes nothing."""
        proxy = self._for(keys)
        return np.zeros(len(keys), dtype=np.bool_) if proxy is None else proxy.contains(keys)

    def match(
        self, keys: BlockKeys, *, split: bool = False, request: Request | None = None
    ) -> Lease:
        """Hold the leading blocks that are here or in a tier, for a `load`. See `Engine.match`."""
        proxy = self._for(keys)
        if proxy is None:
            return Lease(keys, EMPTY, 0, 0.0, _keep)
        if self._recorder is not None:
            self._recorder.asked(keys, request)
        return proxy.match(keys, split, request)  # the daemon counts it

    def match_pools(
        self, tables: Sequence[BlockKeys], *, request: Request | None = None
    ) -> PoolMatch:
        """Hold the longest start of a prompt that all its pools can go on from. See `Engine`."""
        return match_pools(self, tables, request)

    def adopt(self, token: bytes, namespace: Namespace) -> Lease | None:
        """Lease what another process of this tenant has leased: its `lease.token`.

        Both leases end for themselves. None where the other has ended, or is of another namespace.
        """
        proxy = self._for(namespace.keys_of(b""))
        return None if proxy is None else proxy.adopt(token, namespace)

    def observe_prefill(
        self, namespace: Namespace, position: int, tokens: int, seconds: float
    ) -> None:
        """Tell how long a model took to compute tokens. See `Engine.observe_prefill`."""
        check_prefill(position, tokens, seconds)
        proxy = self._for(namespace.keys_of(b""))
        if proxy is not None:
            proxy.observe(namespace, position, tokens, seconds)

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
        """Begin to store blocks that the daemon does not hold yet. See `Engine.save`.

        Once the Transfer is done, whatever process of this host matches the keys finds them.
        """
        transfer, cache, table, mapping = saving(keys, caches, block_table, slot_mapping)
        group = group_of(keys, fill)
        proxy = self._for(keys)
        if proxy is None or not len(keys) or not self._transfers.begin(transfer):
            return transfer.refuse()
        asked = asked_for(retention, self._ttl_s.get(keys.namespace.number))
        parts = (proxy, self._transfers, self._finder, self.metrics, _done)
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
        """Begin to fill the caller's cache with leased blocks. See `Engine.load`."""
        transfer, cache, table, mapping = loading(lease, caches, block_table, slot_mapping, first)
        count = len(transfer.good)
        proxy = self._for(lease.keys)
        if proxy is None or not count or not self._transfers.begin(transfer):
            return transfer.refuse()
        ids, slots, numbers = proxy.pin(lease, first, count)
        if not len(ids):
            return transfer.refuse()
        keys = lease.keys[first : first + count]
        deadline = time.monotonic() + (self.config.fetch_s if timeout_s is None else timeout_s)
        parts = (proxy, self._transfers, (), Asked(proxy, self._fetches), deadline)
        Load(*parts, transfer, keys, ids, numbers, cache, table, mapping).start(slots)
        if first + count < lease.blocks:
            proxy.ahead(lease, first + count)
        return transfer

    def prefetch(self, lease: Lease, first: int = 0) -> int:
        """Have leased blocks read from tiers ahead of a load. Returns how many are asked for."""
        proxy = self._for(lease.keys)
        if proxy is None or not 0 <= first < lease.blocks:
            return 0
        return proxy.ahead(lease, first)

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
        """Store an array under a name and what has computed it. See `Engine.save_array`."""
        check_seconds("ttl_s", ttl_s)
        source = arrays.Source(model, revision, adapter, salt)
        found = arrays.looked_at(array)
        named = arrays.Named(self, source, name)
        try:
            return not self.away and named.save(found, ttl_s, time.time())
        except AwayError:  # from this moment on
            return False

    def load_array(
        self,
        name: str | bytes,
        *,
        model: str,
        revision: str = "",
        adapter: str = "",
        salt: str = "",
    ) -> Export | None:
        """Return a verified copy of an array that `save_array` has stored; None for a miss."""
        named = arrays.Named(self, arrays.Source(model, revision, adapter, salt), name)
        try:
            found = None if self.away else named.load(time.time())
        except AwayError:  # from this moment on
            found = None
        return None if found is None else export(found)

    # Keeping house

    def pin(self, keys: BlockKeys, duration_s: float | None = None, *, hard: bool = False) -> int:
        """Keep the leading blocks that are in memory there. See `Engine.pin`."""
        check_pin(duration_s, hard)
        proxy = self._for(keys)
        return 0 if proxy is None else proxy.keep_in_memory(keys, duration_s)

    def unpin(self, keys: BlockKeys) -> int:
        """Take pins away, soft and hard. Returns how many there were."""
        proxy = self._for(keys)
        return 0 if proxy is None else proxy.let_leave(keys)

    def hint(
        self,
        keys: BlockKeys,
        *,
        session_end: bool = False,
        branch_done: bool = False,
        expect_resume_in: float | None = None,
        prefetch: bool = False,
    ) -> int:
        """Tell what will become of a prompt. See `Engine.hint`."""
        check_hint(session_end, branch_done, expect_resume_in, prefetch)
        proxy = self._for(keys)
        if proxy is None:
            return 0
        if prefetch:
            with self.match(keys) as lease:
                self.prefetch(lease)
        return proxy.hint(keys, branch_done, expect_resume_in)

    def record(self, path: str | Path | None, size_bytes: int = RECORD_BYTES) -> None:
        """Write down what `match` is asked for here. See `Engine.record`."""
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
        """Wait until all that is committed on this host is in the tiers below. False: too late."""
        end = time.monotonic() + timeout_s
        while not self.away and not self._proxy.is_clean():
            if time.monotonic() > end:
                return False
            time.sleep(CLEAN_S)
        return True

    def drop(self, keys: BlockKeys) -> int:
        """Forget blocks everywhere. Returns how many there were."""
        proxy = self._for(keys)
        return 0 if proxy is None else proxy.drop(keys)

    def drop_all(self) -> int:
        """Make every block of this tenant unreachable, for all processes. See `Engine.drop_all`.

        Raises AwayError while the daemon is away, or where this client may only read.
        """
        self._alive()
        epoch = self._proxy.drop_all()
        if not epoch:
            raise AwayError(
                "the daemon is away, or lets this client only read: it has dropped nothing"
            )
        return epoch

    def squeeze(self, nbytes: int) -> int:
        """Evict until at most `nbytes` of the tenant's memory are used."""
        return 0 if self.away else self._proxy.squeeze(nbytes)

    def stats(self) -> dict[str, int]:
        """Return the daemon's counts of this tenant; nothing while it is away."""
        return {} if self.away else self._proxy.stats()

    def warm(self, timeout_s: float | None = None) -> bool:
        """Wait until kernels are loaded and the daemon's memory is mapped. False: not in time."""
        self._preparing.join(timeout_s)
        return not self._preparing.is_alive()

    def check(self) -> None:
        """Raise AssertionError where something is in use still. For tests, at rest."""
        assert not self._proxy.in_use

    def close(self) -> None:
        """End what is under way, and say good-bye. Idempotent. In a forked child it only lets go.

        What was saved is the daemon's.
        """
        if self._closed or self._detached:
            return
        atexit.unregister(self._leave)
        self.record(None)
        self._closed = True
        self._proxy.arena.stop()
        self._preparing.join()
        self._transfers.close(CLOSE_S)
        self._leaving.set()
        self._fetches.close()
        with self._lock:
            self._proxy.close()
        self._hearing.join(CLOSE_S)

    def detach(self) -> None:
        """After a fork, in the child: let go of the sockets; every verb misses from now on."""
        if self._closed or self._detached:
            return
        self._detached = True
        self._recorder = None
        self.metrics = Metrics()
        self._transfers.detach()
        self._fetches.detach()
        self._proxy.forsake()

    # Inside

    def _connect(self) -> Proxy:
        daemon = self._daemon
        key = bytes(daemon.key or b"")
        return Proxy(daemon.socket, daemon.tenant, key, True, daemon.timeout_s)

    def _for(self, keys: BlockKeys) -> Proxy | None:
        """Return who to ask about these keys; None where nothing is held under them."""
        number, proxy = keys.namespace.number, self._proxy
        if self._closed or self._detached or proxy.lost:
            return None
        named = self._named.get(number)
        if named is None or named.space.digest != keys.namespace.digest:
            raise LayoutError(
                f"these keys are of {keys.namespace!r}, which another engine has made: ask this "
                "one with engine.namespace(...)"
            )
        return proxy if self._current[number] and proxy.knows(keys.namespace) else None

    def _alive(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed: open another with kvengine.open")
        if self._detached:
            raise ClosedError("the engine belongs to the process that forked: open one here")

    def _failed(self, error: Exception) -> None:
        self.metrics.add("tier_failures", 1, tier="daemon")

    def settle(self) -> None:
        """Before a fork: let kernels be loaded first, for at most CLOSE_S. See `Engine.settle`."""
        if threading.current_thread() is not self._preparing:
            self._ready.wait(CLOSE_S)

    def _prepare(self) -> None:
        """Have kernels and memory ready before they are asked for."""
        try:
            launch.choose(None)
            launch.coders(None)
        finally:
            self._ready.set()
        _map(self._proxy)

    def _hear(self) -> None:
        """Hear what the daemon says by itself; look for it where it is away."""
        wait_s = BACKOFF_S[0]
        while not self._leaving.is_set():
            try:
                self._proxy.hear()
                wait_s = BACKOFF_S[0]
            except Lost:
                self._proxy.lose()
                if self._leaving.wait(wait_s * random.uniform(0.5, 1.0)):
                    break
                wait_s = min(2 * wait_s, BACKOFF_S[1])
                self._back()
            self._settle()
        for proxy in self._old:
            proxy.forsake()

    def _back(self) -> None:
        """Try to reach the daemon again, and open there what was open."""
        try:
            proxy = self._connect()
        except (OSError, KVEngineError):
            return
        with self._lock:
            if self._closed:
                proxy.close()
                return
            for number, named in self._named.items():
                try:
                    said = proxy.open(named.message)
                except KVEngineError:
                    self._current[number] = False
                    continue
                space = self._space(proxy, named.message, named.space.layout, said, number)
                # Another secret, or a later epoch: keys that were made before name nothing.
                self._current[number] = space == named.space
                if space == named.space:
                    proxy.enter(space, named.codecs, said)
            old, self._proxy = self._proxy, proxy
            self._old.append(old)
            self._preparing.join()
            self._preparing = threading.Thread(
                target=_map, args=(proxy,), name="kvengine-prepare", daemon=True
            )
            self._preparing.start()

    def _settle(self) -> None:
        """Tell the daemon which earlier sessions have nothing in use any more."""
        for old in [each for each in self._old if not each.in_use]:
            here = old.welcome.incarnation == self._proxy.welcome.incarnation
            if here and not self._proxy.settled(old.welcome.session):
                return  # the next connection is told
            old.forsake()
            self._old.remove(old)


def _map(proxy: Proxy) -> None:
    """Have memory mapped that the daemon has backed."""
    if proxy.welcome.populate:
        proxy.arena.populate()


def _keep(lease: Lease) -> None:
    """Let go of a lease of nothing."""


def _done(keys: BlockKeys, count: int) -> None:
    """Leave what follows a save to the daemon."""
