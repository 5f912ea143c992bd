"""The tenants that a daemon serves: an engine and memory of its own for each, one budget for all.

Memory goes where it is used: kvengine.shares says who may hold how much, and here what one holds
beyond that is evicted, given back to the system as zeros, and then lent to another. What a tenant
has reserved is never lent to anyone else.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import blake3
import msgspec
import numpy as np

from kvengine.arena import Arena
from kvengine.config import Config
from kvengine.engine import Engine
from kvengine.errors import KVEngineError
from kvengine.peer.service import Admitted, House, Peer
from kvengine.shares import Limits, Want, shares
from kvengine.slab import PAGE_BYTES, Slab, reader, shared
from kvengine.tenants import DEFAULT, UNLIMITED, Quota, Tenants

GROW = 4  # a tenant that evicts asks for a quarter more than it holds
STEP_SHARE = 64  # and for this part of all memory at least
DISK_SHARE = 8  # of the daemon's directory size, for a tenant that has no size of its own


def label(tenant: str) -> str:
    """Return what stands for a tenant in metrics: whoever reads them learns no names."""
    digest = blake3.blake3(tenant.encode(), derive_key_context="kvengine tenant label 1")
    return tenant if tenant == DEFAULT else digest.hexdigest()[:8]


class Shared:
    """The memory of one tenant, for its engine and its clients: slots, and a word for each page.

    `close` gives the descriptors back; what is mapped stays until nobody uses it.
    """

    def __init__(self, nbytes: int, tenant: str) -> None:
        pages = max(1, nbytes // PAGE_BYTES)
        words = -(-pages * 4 // PAGE_BYTES) * PAGE_BYTES
        self._handles: list[int] = []
        self._lock = threading.Lock()  # no descriptor is given that is being closed
        try:
            for size, what in ((pages * PAGE_BYTES, "slots"), (words, "words")):
                self._handles.append(shared(size, f"kvengine {what} {tenant}"[:200]))
            self._handles += [reader(handle) for handle in self._handles]
            self._words = Slab(words, self._handles[1])
            generations = np.frombuffer(self._words.memory, dtype=np.uint32)[:pages]
            self.arena = Arena(nbytes, self._handles[0], generations)
            self.arena.backing = partial(_backed, self._handles, self._lock)
        except BaseException:
            self.close()
            raise

    def descriptors(self, writable: bool) -> list[int]:
        """Give what a client maps: slots and words; words to be read only.

        Copies, the caller's to close; none where the memory is gone.
        """
        with self._lock:
            if not self._handles:
                return []
            return [os.dup(self._handles[each]) for each in (0 if writable else 2, 3)]

    def close(self) -> None:
        """Let go of the descriptors."""
        with self._lock:
            while self._handles:
                os.close(self._handles.pop())


def _backed(handles: Sequence[int], lock: threading.Lock) -> int:
    """Return for how many pages the system holds memory, whoever has written there."""
    with lock:
        return os.fstat(handles[0]).st_blocks * 512 // PAGE_BYTES if handles else 0


@dataclass(slots=True, eq=False)
class Resident:
    """One tenant as it is served. `pressed`: evictions and refusals when it was last looked at.

    secret: the tenant's when it was opened; whoever has the name later has another.
    """

    engine: Engine
    memory: Shared
    quota: Quota
    secret: bytes
    limits: Limits = field(default_factory=Limits)
    limit_bytes: int = 0
    pressed: int = 0


class Residents:
    """See the module. Any thread may call any verb. The first `balance` opens all tenants.

    tenants: None for those that the directory of the disk tier has.
    """

    def __init__(self, config: Config, tenants: Tenants | None = None) -> None:
        self._tenants = tenants
        self._config = config
        self._lock = threading.Lock()  # of what changes: who is here, who holds how much
        self._by_name: dict[str, Resident] = {}
        self._closed = False

    @property
    def tenants(self) -> Tenants:
        """Who may be here. Those of a directory are known once the default tenant is open."""
        assert self._tenants is not None
        return self._tenants

    def engines(self) -> dict[str, Engine]:
        """Return the engines by the names of their tenants."""
        return {name: each.engine for name, each in list(self._by_name.items())}

    def residents(self) -> list[Resident]:
        """Return all who are here."""
        return list(self._by_name.values())

    def descriptors(self, house: House, writable: bool) -> list[int]:
        """Give what a client of an engine maps: copies; none where its tenant has gone."""
        for each in self.residents():
            if each.engine is house:
                return each.memory.descriptors(writable)
        return []

    def admit(self, peer: Peer, tenant: str, credential: bytes) -> Admitted | str:
        """Say which tenant's blocks a client may use and how, or why none."""
        name = tenant or DEFAULT
        found = self._by_name.get(name)
        self.tenants.reload()
        mode = self.tenants.admits(name, peer.uid, credential, time.time())
        if found is None or not mode:
            # The same words for all: nobody learns which tenants there are.
            return (
                f"tenant {name!r} is not served to user {peer.uid} with what was given: run the "
                "client as one of the tenant's users, or give its access key or a ticket"
            )
        return Admitted(found.engine, mode == "rw", found.limits)

    def gone(self) -> list[str]:
        """Return the tenants that are here and have been removed, the default one never."""
        self.tenants.reload()
        return [
            name
            for name, each in list(self._by_name.items())
            if name != DEFAULT and not self.tenants.is_same(name, each.secret)
        ]

    def balance(self) -> None:
        """Take in tenants that have come and go out with the removed ones; move memory between all.

        May take its time: it evicts, opens and closes. Raises what the first tenant does that
        cannot be opened, ConfigError say, when all the others have been seen to.
        """
        failed: list[Exception] = []
        with self._lock:
            if self._closed:
                return
            if self._tenants is None:
                self._open(DEFAULT)
                self._tenants = self._by_name[DEFAULT].engine.tenants
            for name in self.gone():
                self._leave(name)
            for name in self.tenants.names():
                try:
                    if name not in self._by_name:
                        self._open(name)
                    quota = self.tenants.quota(name)
                except (KVEngineError, OSError) as error:
                    failed.append(error)
                    continue
                resident = self._by_name[name]
                resident.quota = quota
                resident.limits.set(quota.lookups_per_s, quota.saved_bytes_per_s)
            self._move()
        if failed:
            raise failed[0]

    def close(self) -> None:
        """End all engines, give all memory back."""
        with self._lock:
            self._closed = True
            for resident in self._by_name.values():
                resident.engine.close()
                resident.memory.close()
            self._by_name = {}

    def _move(self) -> None:
        """Lower the limits of those over their shares first, then raise those of the others."""
        total = self._config.memory_bytes
        wanted = {name: self._want(each) for name, each in self._by_name.items()}
        target = shares(total, wanted)
        # What nobody wants now is there for whoever comes first.
        rest = total - sum(target.values())
        more = {
            name: want._replace(want_bytes=total, reserved_bytes=target[name])
            for name, want in wanted.items()
        }
        target = shares(total, more) if rest > 0 else target
        held = 0
        for name, each in self._by_name.items():
            each.limit_bytes = min(each.limit_bytes, target[name])
            held += max(each.limit_bytes, each.engine.limit(each.limit_bytes))
        left = total - held
        for name, each in self._by_name.items():
            step = min(left, target[name] - each.limit_bytes)
            if step > 0:
                each.limit_bytes += step
                left -= step
                each.engine.limit(each.limit_bytes)

    def _want(self, each: Resident) -> Want:
        """Say what a tenant holds, and that it wants more if it has evicted or refused."""
        used = each.engine.memory_bytes()
        pressed = each.engine.pressed()
        if pressed != each.pressed:
            used += max(used // GROW, self._config.memory_bytes // STEP_SHARE)
        each.pressed = pressed
        quota = each.quota
        want = max(used, quota.reserved_bytes)
        return Want(want, quota.reserved_bytes, quota.maximum_bytes, quota.weight)

    def _open(self, name: str) -> None:
        tenants = self._tenants
        quota = UNLIMITED if tenants is None else tenants.quota(name)
        secret = b"" if tenants is None else tenants.secret(name)
        config = self._config_of(name, quota)
        memory = Shared(config.memory_bytes, name)
        try:
            if tenants is not None and len(tenants.names()) > 1:
                memory.arena.limit(0)  # until it is known who holds how much
            engine = Engine(config, memory.arena, name, tenants)
            engine.store.retaining()  # the first blocks of a client are kept as it asks, too
            engine.settle()  # no client is to wait for compiled loops to be loaded
        except BaseException:
            memory.close()
            raise
        self._by_name[name] = Resident(engine, memory, quota, secret)

    def _leave(self, name: str) -> None:
        """Close a removed tenant's engine, and remove what it has kept on disk."""
        resident = self._by_name.pop(name)
        resident.engine.close()
        resident.memory.close()
        disk = resident.engine.config.disk
        if disk is not None:
            shutil.rmtree(disk.path, ignore_errors=True)

    def _config_of(self, name: str, quota: Quota) -> Config:
        """Return a tenant's settings: the daemon's, with a place of its own in each tier."""
        config = self._config
        most = config.memory_bytes if quota.maximum_bytes is None else quota.maximum_bytes
        changes: dict[str, object] = {
            "memory_bytes": max(PAGE_BYTES * 16, min(most, config.memory_bytes))
        }
        if name == DEFAULT:
            return msgspec.structs.replace(config, **changes)
        changes["secret"] = None
        if config.disk is not None:
            size = quota.disk_bytes or config.disk.size_bytes // DISK_SHARE
            path = str(Path(config.disk.path) / f"tenant.{name}")
            changes["disk"] = msgspec.structs.replace(config.disk, path=path, size_bytes=size)
        if config.valkey is not None:
            prefix = f"{config.valkey.prefix}{name}:"
            changes["valkey"] = msgspec.structs.replace(config.valkey, prefix=prefix)
        if config.objects is not None:
            url = f"{config.objects.url.rstrip('/')}/{name}"
            changes["objects"] = msgspec.structs.replace(config.objects, url=url)
        return msgspec.structs.replace(config, **changes)
